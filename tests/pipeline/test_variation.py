"""Variation seeds: noise on the great circle between two seeds' noise."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from ldm.job import Job
from ldm.metadata.command import arguments
from ldm.metadata.foreign.webui import read
from ldm.metadata.infotext import infotext, job_from_infotext
from ldm.metadata.recipe import Recipe
from ldm.models.diffusion.noise import PhiloxNoise
from ldm.pipeline import Pipeline
from ldm.pipeline.jobs import numbered
from ldm.pipeline.noise import turned, varied
from tests.support.golden_data import small_config, tiny_model

JOB = Job("a cat", width=64, height=64, steps=2, seed=7, variation_seed=9, variation_strength=0.3)


def noise(seed):
    return PhiloxNoise(seed, "cpu").draw((1, 4, 8, 8))


def test_ends_and_angles():
    """Each column is a vector: it has the angle to both ends, and a length between theirs."""
    a, b = noise(7), noise(9)
    assert torch.allclose(varied(a, [replace(JOB, variation_strength=0.0)]), a)
    assert torch.allclose(turned(a, b, 1.0), b, atol=1e-5)
    units = [x / x.norm(dim=2, keepdim=True) for x in (a, b)]
    c = turned(*units, 0.3)
    assert torch.allclose(c.norm(dim=2), torch.ones(1, 4, 8), atol=1e-5)
    whole, part = (torch.acos((units[0] * x).sum(2).clamp(-1, 1)) for x in (units[1], c))
    assert torch.allclose(part, 0.3 * whole, atol=1e-3)
    assert torch.allclose(varied(a, [JOB]), turned(a, b, 0.3))


def test_nearly_equal_noise_is_mixed_on_a_line():
    a = noise(7)
    b = a + 1e-4 * noise(9)
    assert torch.allclose(turned(a, b, 0.25), 0.25 * a + 0.75 * b)


def test_several_images_count_the_variation_up():
    jobs = numbered([JOB, JOB, replace(JOB, variation_strength=0.0)])
    assert [(job.seed, job.variation_seed) for job in jobs] == [(7, 9), (7, 10), (9, 9)]


def test_images_of_a_batch_and_alone():
    pipeline = Pipeline(tiny_model(small_config()))
    together = [picture.pixels.astype(int) for picture in pipeline.make(numbered([JOB, JOB]))]
    alone = pipeline.make([replace(JOB, variation_seed=10)])[0].pixels
    plain = pipeline.make([replace(JOB, variation_strength=0.0)])[0].pixels
    assert abs(together[1] - alone).mean() < 1 and abs(together[0] - together[1]).mean() > 2
    assert abs(together[0] - plain).mean() > 2
    other = pipeline.make([replace(JOB, variation_strength=1.0)])[0].pixels.astype(int)
    assert abs(other - pipeline.make([replace(JOB, seed=9, variation_strength=0.0)])[0].pixels).max() <= 1


def test_metadata_both_ways():
    assert job_from_infotext(infotext(JOB, {"Version": "ldm x"})) == JOB
    text = "a cat\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 5, Size: 64x64, Variation seed: 12, "
    found = read(text + "Variation seed strength: 0.15, Version: v1.10.1")
    assert (found.job.variation_seed, found.job.variation_strength) == (12, 0.15)
    assert not any("ariation" in note for note in found.notes)


@pytest.mark.parametrize("position", [0, 2])
def test_the_command_of_an_image_in_a_batch(position):
    recipe = Recipe(JOB, "ldm", extras={"Batch size": "4", "Batch pos": str(position)})
    _, typed = arguments(recipe, {})
    at = typed.index("--variation_seed")
    assert typed[at + 1] == str(9 - position) and typed[typed.index("--seed") + 1] == "7"
    assert np.isclose(float(typed[typed.index("--variation_strength") + 1]), 0.3)
