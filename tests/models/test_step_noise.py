"""The noise of steps: a Brownian path of each image's seed, as torchsde's, or a stream of its own."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch

from ldm.job import Job
from ldm.models.diffusion.noise import PerImageNoise, PhiloxNoise, noise_source
from ldm.models.diffusion.passes import check_sampling, follows_path
from ldm.models.diffusion.schedules import Schedule
from ldm.models.diffusion.solvers import SOLVERS
from ldm.models.diffusion.step_noise import BrownianPath, SeparateSteps, brownian_steps, stream_of_steps
from ldm.pipeline.noise import sampling_noise
from ldm.util import InputError
from tests.support.gaussian import ALPHAS, GaussianModel
from tests.support.golden_data import figures, keys

SHAPE = (1, 4, 3, 3)
TREES = ["dpmpp_sde", "dpmpp_2m_sde", "dpmpp_2m_sde_heun", "dpmpp_3m_sde"]


def test_paths_are_those_of_torchsde() -> None:
    """k-diffusion's BrownianTreeNoiseSampler over torchsde 0.2.6, with torch's generator on the CPU.

    Steps of a schedule, others that begin or end between its levels, and a seed of more than 32 bits.
    """
    golden = figures("brownian.npz")
    levels = [float(sigma) for sigma in golden["sigmas"] if sigma > 0]
    steps = brownian_steps("cpu", [int(seed) for seed in golden["seeds"]], "cpu")(levels, levels[3])
    for (start, end), theirs in zip(golden["pairs"], golden["noise"], strict=True):
        ours = steps.between((2, 4, 3, 3), start, end)
        assert np.abs(ours.numpy() - theirs).max() < 1e-4 * max(1.0, (start - end) ** -0.5)


def karras(steps: int) -> list[float]:
    alphas = Schedule("karras").levels(steps, ALPHAS).alphas
    return [float(sigma) for sigma in ((1 - alphas) / alphas) ** 0.5 if sigma > 0]


@pytest.mark.parametrize("rng", ["philox", "cpu"])
def test_any_number_of_steps_follows_one_path(rng: str) -> None:
    """The increments of 10 steps and of 19, where levels of both meet, add up to the same."""
    coarse, fine = karras(10), karras(19)
    ends = coarse[0], coarse[-1]
    assert np.allclose(ends, (fine[0], fine[-1]))
    made = [brownian_steps(rng, [5], "cpu")(levels, levels[0]) for levels in (coarse, fine)]  # type: ignore[arg-type]
    sums = [
        sum((steps.between(SHAPE, s, e) * (s - e) ** 0.5 for s, e in pairwise(levels)), torch.zeros(SHAPE))
        for steps, levels in zip(made, (coarse, fine), strict=True)
    ]
    assert torch.allclose(*sums, atol=1e-4) and float(sums[0].std()) > 1
    middle = [steps.between(SHAPE, 9.0, 1.0) for steps in made]
    assert torch.allclose(*middle, atol=1e-5)


def test_increments_are_normal_and_independent() -> None:
    path = BrownianPath("philox", 3, 0.03, 14.6, "cpu")
    levels = [14.6, 9.0, 5.5, 5.0, 1.0, 0.4, 0.03]
    parts = torch.stack([path.increment((1, 4, 50, 50), s, e).flatten() for s, e in pairwise(levels)])
    assert torch.allclose(torch.corrcoef(parts), torch.eye(6), atol=0.04)
    assert torch.allclose(parts.std(1), torch.ones(6), atol=0.03) and float(parts.mean().abs()) < 0.02


def latents(name: str, seeds: Sequence[int], steps: int = 5, **job: object) -> torch.Tensor:
    """A run of a batch in which each image has its seed."""
    model = GaussianModel(torch.tensor([0.5]), torch.tensor([0.3]), 0.15)
    sampler = SOLVERS[name].make(model, "karras")
    sampler.make_schedule(steps, verbose=False)
    jobs = [Job("", sampler=name, seed=seed, **job) for seed in seeds]  # type: ignore[arg-type]
    noise = sampling_noise(jobs, torch.device("cpu"))
    x = sampler.starting(noise.draw((len(seeds), 1, 8, 8)))
    return sampler.decode(x, None, steps, noise=noise)


@pytest.mark.parametrize("name", TREES)
def test_an_image_has_its_path_whatever_its_neighbours(name: str) -> None:
    both = latents(name, [3, 4], convention="a1111")
    assert torch.equal(both[:1], latents(name, [3], convention="a1111"))
    assert torch.equal(both[1:], latents(name, [4], step_noise="brownian"))
    assert not torch.allclose(both[1:], latents(name, [4]), atol=0.05)


def test_a_path_makes_few_and_many_steps_alike() -> None:
    """Samples of 40 and of 80 steps are the same picture; with the stream of the image they are not."""
    asked = {"steps": 40, "step_noise": "brownian"}
    near, far = latents("dpmpp_2m_sde", [9], **asked), latents("dpmpp_2m_sde", [9], **{**asked, "steps": 80})  # type: ignore[arg-type]
    assert float((near - far).std()) < 0.25 * float(near.std())
    assert float((latents("dpmpp_2m_sde", [9], 40) - latents("dpmpp_2m_sde", [9], 80)).std()) > 0.5 * float(
        near.std()
    )


def test_steps_with_a_stream_of_their_own() -> None:
    """A generator of the same seed from its beginning, or one of another seed: as ComfyUI, and A1111's ENSD."""
    for job, steps in (
        ({"rng": "cpu", "step_rng": "philox"}, PhiloxNoise(2**40 + 7, "cpu")),
        ({"rng": "philox", "step_seed_delta": 31337}, PhiloxNoise(2**40 + 7 + 31337, "cpu")),
        ({"rng": "philox", "step_rng": "philox"}, None),
    ):
        found = latents("euler_a", [2**40 + 7], **job)  # type: ignore[arg-type]
        source = noise_source(job["rng"], "image", [2**40 + 7], "cpu")  # type: ignore[arg-type]
        sampler = SOLVERS["euler_a"].make(
            GaussianModel(torch.tensor([0.5]), torch.tensor([0.3]), 0.15), "karras"
        )
        sampler.make_schedule(5, verbose=False)
        x = sampler.starting(source.draw((1, 1, 8, 8)))
        assert torch.equal(found, sampler.decode(x, None, 5, noise=source if steps is None else steps))


def test_masks_and_starts_draw_from_the_image() -> None:
    """The noise of what a mask keeps is no noise of a step."""
    source = SeparateSteps(PerImageNoise([PhiloxNoise(1, "cpu")]), brownian_steps("philox", [1], "cpu"))
    sampler = SOLVERS["dpmpp_2m_sde"].make(GaussianModel(torch.tensor([0.5]), torch.tensor([0.3])), "karras")
    sampler.make_schedule(4, verbose=False)
    mask, x0 = torch.ones(1, 1, 8, 8), torch.zeros(1, 1, 8, 8)
    sampler.decode(x0, None, 4, noise=source, mask=mask, x0=x0)
    expected = PhiloxNoise(1, "cpu")
    for _ in range(4):
        expected.skip(x0.shape)
    assert torch.equal(source.draw(x0.shape), expected.draw(x0.shape))


def test_a_stream_begins_anew_in_each_run() -> None:
    start = stream_of_steps("philox", [1, 2], "cpu")
    one, two = (start([1.0], 1.0) for _ in range(2))
    first = one.between((2, 3), 1, 0.5)
    one.skip((2, 3))
    two.skip((2, 3))
    assert torch.equal(first[1], PhiloxNoise(2, "cpu").draw((3,)))
    assert not torch.equal(one.between((2, 3), 1, 0.5), two.between((2, 3), 1, 0.5))


@pytest.mark.parametrize("name", SOLVERS)
def test_conventions_choose_paths(name: str) -> None:
    for convention in ("a1111", "comfyui"):
        job = Job("", sampler=name, convention=convention)  # type: ignore[arg-type]
        assert follows_path(job) == (name in TREES)
    assert not follows_path(Job("", sampler=name)) and follows_path(Job("", step_noise="brownian"))
    assert not follows_path(Job("", sampler=name, convention="a1111", seed_mode="batch"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sampler": "heun", "step_noise": "brownian"}, "--step_noise brownian .* not with heun"),
        (
            {"sampler": "euler_a", "step_rng": "cpu", "seed_mode": "batch"},
            "--step_rng cpu .* --seed_mode batch",
        ),
        ({"sampler": "euler_a", "step_seed_delta": 3, "seed_mode": "batch"}, "--step_seed_delta 3 .* leave"),
        ({"sampler": "ddpm", "step_noise": "brownian", "seed_mode": "batch"}, "--step_noise brownian .* one"),
    ],
)
def test_what_does_not_go_together_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_sampling(Job("x", **values))  # type: ignore[arg-type]


def test_a_batch_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="1 paths"):
        brownian_steps("cpu", [1], "cpu")([2.0, 1.0], 2.0).between((2, 1, 2, 2), 2.0, 1.0)


def test_schedules_whose_paths_are_compared() -> None:
    assert len(karras(10)) == 10 and np.allclose(
        karras(10), keys("schedules.json")["karras_10"][:-1], rtol=1e-5
    )
