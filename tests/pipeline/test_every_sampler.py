"""Every sampler in every mode of the pipeline: from noise and images, with masks, twice as large, in batches."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from ldm.job import Init, Job
from ldm.models.diffusion.passes import passes_of
from ldm.models.diffusion.solvers import SOLVERS
from ldm.pipeline import GeneratedImage, Pipeline
from tests.support.golden_data import inpainting_config, small_config, tiny_model

STEPS = 3
# one of each kind; the other rows of the table are slow
QUICK = ("ddim", "dpmpp_sde", "unipc", "lcm")
ALL = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in SOLVERS]
RAMP = np.tile(np.linspace(0, 255, 64, dtype=np.uint8)[:, None, None], (1, 64, 3))
LEFT = np.where(np.arange(64) < 32, 255, 0).astype(np.uint8)[None].repeat(64, 0)


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline(tiny_model(small_config()))


@pytest.fixture(scope="module")
def inpainting() -> Pipeline:
    return Pipeline(tiny_model(inpainting_config(small_config())))


def job_of(name: str, **values: object) -> Job:
    return Job("a red cube", sampler=name, steps=STEPS, width=64, height=64, seed=11, **values)  # type: ignore[arg-type]


def both(pipeline: Pipeline, job: Job) -> list[GeneratedImage]:
    """The images of a job and of the one with the next seed, in one batch; the steps are counted."""
    seen = list[int]()
    jobs = [job, dataclasses.replace(job, seed=job.seed + 1)]
    pictures = pipeline.make(jobs, on_step=lambda step: seen.append(step.index))
    assert len(seen) == sum(one.steps for one in passes_of(job))
    return pictures


def apart(one: GeneratedImage, two: GeneratedImage) -> float:
    return float(np.abs(one.pixels.astype(float) - two.pixels).mean())


@pytest.mark.parametrize("name", ALL)
def test_every_sampler_makes_a_batch_in_two_passes(pipeline: Pipeline, name: str) -> None:
    """An image does not depend on its neighbours but for the last bits, with a path of noise too."""
    job = job_of(name, upscale=1.25)
    first, second = both(pipeline, job)
    assert first.pixels.shape == (80, 80, 3) and apart(first, second) > 3
    (alone,) = pipeline.make(dataclasses.replace(job, seed=12))
    assert apart(second, alone) < 1
    run = [dataclasses.replace(job, seed_mode="batch", batch_index=i) for i in range(2)]
    one, two = pipeline.make(run)
    assert apart(one, two) > 3


@pytest.mark.parametrize("name", ALL)
def test_every_sampler_begins_from_an_image(pipeline: Pipeline, name: str) -> None:
    """The weaker, the closer to the image as the autoencoder gives it, by the original's rule and by A1111's."""
    job = job_of(name, init=Init(RAMP), strength=0.7)  # type: ignore[arg-type]
    (still,) = pipeline.make(dataclasses.replace(job, strength=0.0))
    weak, strong = (pipeline.make(dataclasses.replace(job, strength=s))[0] for s in (0.4, 1.0))
    assert 0 < apart(weak, still) < apart(strong, still)
    assert apart(*both(pipeline, job)) > 0.5
    both(pipeline, dataclasses.replace(job, convention="a1111"))


@pytest.mark.parametrize("kind", ["pipeline", "inpainting"])
@pytest.mark.parametrize("name", ALL)
def test_every_sampler_repaints_a_part(request: pytest.FixtureRequest, kind: str, name: str) -> None:
    model = request.getfixturevalue(kind)
    job = job_of(name, init=Init(RAMP, mask=LEFT, mask_blur=0.0), strength=0.7)  # type: ignore[arg-type]
    first, second = both(model, job)
    assert np.array_equal(first.pixels[:, 32:], RAMP[:, 32:]) and apart(first, second) > 0.5


@pytest.mark.parametrize(
    "name", ["dpmpp_sde", "dpmpp_2m_sde", "dpmpp_2m_sde_heun", "dpmpp_3m_sde", "euler_a", "lcm"]
)
def test_a_path_of_noise_is_that_of_the_image(pipeline: Pipeline, name: str) -> None:
    job = job_of(name, step_noise="brownian")
    _, second = both(pipeline, job)
    (alone,) = pipeline.make(dataclasses.replace(job, seed=12))
    assert apart(second, alone) < 1 and apart(alone, pipeline.make(job_of(name))[0]) > 3


def test_values_of_prompts_share_a_batch(pipeline: Pipeline) -> None:
    """CLIP skip and the share of rescaled guidance are those of each image; steps and samplers are the batch's."""
    job = job_of("euler")
    others = [dataclasses.replace(job, clip_skip=2), dataclasses.replace(job, guidance_rescale=0.7)]
    together = pipeline.begin([job, *others])
    alone = [pipeline.make(one)[0] for one in (job, *others)]
    for one, two in zip(pipeline.finish(together), alone, strict=True):
        assert apart(one, two) < 1
    assert apart(alone[0], alone[1]) > 1 and apart(alone[0], alone[2]) > 0.1
    with pytest.raises(ValueError, match="one batch"):
        pipeline.begin([job, dataclasses.replace(job, sampler="heun")])
