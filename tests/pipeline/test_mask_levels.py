"""Grey masks: each grey is freed at its step; black and white alone are an ordinary mask."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.job import Init, Job
from ldm.models.diffusion.sampling_run import MaskLevels
from ldm.pipeline import Pipeline
from tests.support.golden_data import small_config, tiny_model


@pytest.fixture(scope="module")
def pipeline():
    return Pipeline(tiny_model(small_config()))


def image_of(tmp_path, grey):
    pixels = np.random.RandomState(2).randint(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    Image.fromarray(grey).save(tmp_path / "mask.png")
    init = Init(str(tmp_path / "image.png"), mask=str(tmp_path / "mask.png"), mask_blur=0)
    return Job("a cat", width=64, height=64, steps=4, seed=3, init=init), pixels


def with_levels(job):
    return replace(job, init=replace(job.init, mask_levels=True))


def test_black_and_white_are_an_ordinary_mask(pipeline, tmp_path):
    grey = np.zeros((64, 64), np.uint8)
    grey[:, 32:] = 255
    job, pixels = image_of(tmp_path, grey)
    plain, levels = (pipeline.make([one])[0].pixels for one in (job, with_levels(job)))
    assert np.array_equal(plain, levels)
    assert np.array_equal(levels[:, :32], pixels[:, :32]) and not np.array_equal(
        levels[:, 32:], pixels[:, 32:]
    )


@pytest.mark.parametrize(("grey", "freed"), [(0, 5), (64, 4), (128, 3), (192, 2), (250, 1), (255, 0)])
def test_a_grey_is_freed_when_its_share_of_the_steps_is_left(grey, freed):
    """Of five steps the first ones keep it: until the share that is left is its whiteness."""
    mask = MaskLevels(torch.tensor(1 - np.float32(grey) / 255))
    assert [bool(mask.at(i / 5)) for i in range(5)] == [True] * freed + [False] * (5 - freed)


def test_lighter_parts_change_more(pipeline, tmp_path):
    grey = np.repeat(np.array([0, 64, 128, 192, 255], np.uint8), [8, 14, 14, 14, 14])[None].repeat(64, axis=0)
    job, pixels = image_of(tmp_path, grey)
    job = replace(with_levels(job), steps=8, paste=False)
    found = pipeline.make([job])[0].latent
    start = pipeline.encode(pixels)
    change = (found - start).abs().mean((0, 1, 2))
    assert change[0] < change[3] < change[7]
