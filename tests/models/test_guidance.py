"""Guidance over the steps, by how much and at what cost, and towards several prompts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ldm.job import Job
from ldm.models.diffusion.course import CURVES, Course, Moment, check_guidance
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.guidance import Guidance, GuidancePlan
from ldm.models.diffusion.plms import PLMSSampler
from ldm.models.diffusion.solvers import SOLVERS
from ldm.util import InputError

X = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(1))
COND, UNCOND = torch.full((2, 1, 1, 1), 0.5), torch.full((2, 1, 1, 1), 0.2)


class Toy:
    """Predicts x times its conditioning; records the samples of each call."""

    num_timesteps = 1000

    def __init__(self) -> None:
        self.alphas_cumprod = torch.from_numpy(np.cumprod(1 - np.linspace(0.03, 0.1, 1000) ** 2)).float()
        self.calls: list[int] = []

    def apply_model(self, x_noisy: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        self.calls.append(len(x_noisy))
        return x_noisy * cond


def decoded(
    model: Toy, plan: GuidancePlan, steps: int = 10, run: int = 10, kind: Any = DDIMSampler
) -> Tensor:
    sampler = kind(model)
    sampler.make_schedule(steps, verbose=False)
    return sampler.decode(X, None, run, plan=plan)


def of_course(course: Course, scale: float | Tensor = 3.0) -> GuidancePlan:
    return GuidancePlan([(9, Guidance(COND, UNCOND, scale))], course)


@pytest.mark.parametrize(
    ("course", "run", "samples"),
    [
        (Course((0.1, 0.7)), 10, [2, 4, 4, 4, 4, 4, 4, 2, 2, 2]),
        (Course((0.3, 0.3)), 10, [2] * 10),
        (Course((0.0, 1.0)), 10, [4] * 10),
        # from an image: shares of the whole schedule
        (Course((0.1, 0.7)), 5, [4, 4, 2, 2, 2]),
        # the toy has sigma 0.52 to 14 at the ten timesteps 1, 101 ... 901
        (Course((0.0, 1e9), in_sigma=True), 10, [4] * 10),
        (Course((1e9, 2e9), in_sigma=True), 10, [2] * 10),
    ],
)
def test_a_step_outside_of_the_interval_runs_the_half_that_counts(
    course: Course, run: int, samples: list[int]
) -> None:
    model = Toy()
    decoded(model, of_course(course), run=run)
    assert model.calls == samples


def test_an_interval_in_sigma_holds_its_upper_end_and_not_its_lower_one() -> None:
    model = Toy()
    sampler = DDIMSampler(model)
    sampler.make_schedule(10, verbose=False)
    sigmas = [((1 - step.alpha) / step.alpha) ** 0.5 for step in sampler.table.downwards()]
    decoded(model, of_course(Course((sigmas[6], sigmas[2]), in_sigma=True)))
    assert model.calls == [2, 2, 4, 4, 4, 4, 2, 2, 2, 2]


@pytest.mark.parametrize("kind", [DDIMSampler, PLMSSampler, DPMSolverSampler])
def test_guidance_over_the_steps_is_a_run_stitched_of_runs_with_other_scales(kind: Any) -> None:
    """DDIM has no memory, so its steps can be run one by one; all have a course of equal steps as the plain run."""
    whole = decoded(Toy(), of_course(Course(curve="constant")), kind=kind)
    sampler = kind(Toy())
    sampler.make_schedule(10, verbose=False)
    plain = sampler.decode(X, COND, 10, unconditional_guidance_scale=3.0, unconditional_conditioning=UNCOND)
    assert torch.equal(whole, plain)
    if kind is not DDIMSampler:
        return
    x = X
    for i in range(10):
        scale = 1 + 2 * (2 * i + 1) / 10 if 1 <= i < 7 else 1.0
        t = torch.full((2,), int(sampler.ddim_timesteps[9 - i]))
        x, _ = sampler.p_sample_ddim(
            x, COND, t, 9 - i, unconditional_guidance_scale=scale, unconditional_conditioning=UNCOND
        )
    torch.testing.assert_close(decoded(Toy(), of_course(Course((0.1, 0.7), curve="linear"))), x)


@pytest.mark.parametrize(
    ("kind", "calls"),
    [(PLMSSampler, [2, 2] + [4] * 9), (SOLVERS["heun"].make, [2] * 2 + [4] * 17)],
)
def test_a_solver_that_predicts_twice_in_a_step_has_one_guidance_there(kind: Any, calls: list[int]) -> None:
    model = Toy()
    decoded(model, of_course(Course((0.1, 1.0))), kind=kind)
    assert model.calls == calls


@pytest.mark.parametrize("curve", CURVES)
def test_the_mean_of_a_schedule_is_the_scale(curve: str) -> None:
    scales = torch.tensor([3.0, 1.0])[:, None, None, None]
    plan = of_course(Course(curve=curve), scales)
    at = [plan.at(Moment(i, i, 20, 0.5)).scale for i in range(20)]
    torch.testing.assert_close(torch.stack([torch.as_tensor(scale) for scale in at]).mean(0), scales)
    assert max(float(scale[0]) for scale in at if isinstance(scale, Tensor)) > 4.5


def test_steps_with_other_scales_share_the_joined_conditioning() -> None:
    """So that models compute what depends on it once."""
    plan = of_course(Course(curve="cosine"))
    first, last = (plan.at(Moment(i, i, 20, 0.5)) for i in (0, 19))
    assert first.scale != last.scale
    assert first.both is last.both


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"guidance_interval": (0.7, 0.1)}, "first value is the higher one; give 0.1,0.7"),
        ({"guidance_interval": (0.28, 5.42)}, "add --guidance_interval_in sigma"),
    ],
)
def test_intervals_that_are_refused(fields: dict[str, Any], fault: str) -> None:
    with pytest.raises(InputError, match=fault):
        check_guidance(replace(Job("a"), **fields))


# --- prompts joined by AND -----------------------------------------------------------------------------------------


def composed(weights: list[list[float]], scale: float, **fields: Any) -> Guidance:
    """Two samples with conditionings 0.5 and 0.7, then 0.1 and 0.3, away from 0.2."""
    cond = torch.tensor([0.5, 0.7, 0.1, 0.3])[:, None, None, None]
    return Guidance(cond, UNCOND, scale, weights=torch.tensor(weights)[..., None, None, None], **fields)


def test_directions_of_joined_prompts_are_added_with_their_weights() -> None:
    model = Toy()
    found = composed([[1.2, 1.0], [-0.5, 2.0]], 3.0).noise(model, X, torch.tensor([5, 5]))
    factors = [0.2 + 3 * (1.2 * 0.3 - 0.5 * -0.1), 0.2 + 3 * (0.5 + 2 * 0.1)]
    torch.testing.assert_close(found, X * torch.tensor(factors)[:, None, None, None])
    assert model.calls == [6]


def test_a_weight_counts_without_guidance_too_and_outside_of_the_interval_from_the_first_prompt() -> None:
    model = Toy()
    alone = composed([[1.2, 1.0], [-0.5, 2.0]], 1.0)
    found = alone.noise(model, X, torch.tensor([5, 5]))
    factors = [0.2 + 1.2 * 0.3 - 0.5 * -0.1, 0.2 + 0.5 + 2 * 0.1]
    torch.testing.assert_close(found, X * torch.tensor(factors)[:, None, None, None])
    found = alone.with_share(0).noise(model, X, torch.tensor([5, 5]))
    factors = [0.5 - 0.5 * (0.1 - 0.5), 0.7 + 2 * (0.3 - 0.7)]
    torch.testing.assert_close(found, X * torch.tensor(factors)[:, None, None, None])
    assert model.calls == [6, 4]


def test_joined_prompts_are_rescaled_to_the_contrast_of_their_sum() -> None:
    found = composed([[1.0, 1.0], [1.0, 1.0]], 3.0, rescale=1.0).noise(Toy(), X, torch.tensor([5, 5]))
    ratio = found.std((1, 2, 3)) / X.std((1, 2, 3))
    torch.testing.assert_close(ratio, torch.tensor([0.5 - 0.1, 0.7 + 0.1]))
