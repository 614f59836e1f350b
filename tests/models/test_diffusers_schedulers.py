"""The solvers against the schedulers of diffusers: the same levels, the same noise, the same latents."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from ldm.job import Init, Job
from ldm.models.diffusion.passes import passes_of, schedule_of
from ldm.models.diffusion.schedules import Schedule
from ldm.models.diffusion.solvers import SOLVERS, solve
from tests.support.gaussian import SIGMAS, GaussianModel, noise_of
from tests.support.golden_data import figure, relative_error

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")
SHAPE = (2, 4, 6, 6)
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
TRAILING = {"timestep_spacing": "trailing"}
PLUS = {**TRAILING, "algorithm_type": "dpmsolver++", "final_sigmas_type": "zero"}
SDE = {**PLUS, "algorithm_type": "sde-dpmsolver++"}


class Known(GaussianModel):
    """Data of a known distribution, and a nonlinear part; in float32, as the schedulers compute."""

    def __init__(self):
        super().__init__(figure("gauss/mean", "samplers.npz"), figure("gauss/var", "samplers.npz"), 0.15)


@pytest.fixture(scope="module")
def schedulers():
    return pytest.importorskip("diffusers.schedulers")


def theirs(monkeypatch: pytest.MonkeyPatch, scheduler: Any, x: Tensor, eta: float | None) -> Tensor:
    """The latents of a scheduler from `x`, the first input in its own scale, with our noise where it draws."""
    noise = noise_of(7, SHAPE)
    module = sys.modules[type(scheduler).__module__]
    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(
            module, "randn_tensor", lambda *_, **__: torch.from_numpy(next(noise)).to(x.dtype)
        )
    model = Known()
    for t in scheduler.timesteps:
        eps = model.apply_model(scheduler.scale_model_input(x, t), t.repeat(2).double(), None)
        x = scheduler.step(eps, t, x, **({} if eta is None else {"eta": eta})).prev_sample
    return x


class Case(NamedTuple):
    """Our solver and its settings; their scheduler, its options, and the eta of its steps."""

    name: str
    settings: dict[str, float]
    scheduler: str
    options: dict[str, Any]
    eta: float | None = None


@pytest.mark.parametrize("case", [
    Case("euler", {}, "EulerDiscreteScheduler", TRAILING),
    Case("euler", {}, "EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    Case("euler_a", {}, "EulerAncestralDiscreteScheduler", TRAILING),
    Case("heun", {}, "HeunDiscreteScheduler", TRAILING),
    Case("dpm2", {}, "KDPM2DiscreteScheduler", TRAILING),
    Case("dpm2_a", {}, "KDPM2AncestralDiscreteScheduler", TRAILING),
])  # fmt: skip
def test_schedulers_in_sigma(schedulers, monkeypatch, case):
    """Their latents are x_0 + sigma eps, as ours of `solve`."""
    scheduler = getattr(schedulers, case.scheduler)(**SCHEDULE, **case.options)
    scheduler.set_timesteps(12)
    sigmas = (
        scheduler.sigmas.double().unique().flip(0)
    )  # schedulers of two calls a step list a level for each
    if case.name == "dpm2_a":  # and here also those between
        sigmas = torch.cat([scheduler.sigmas[:1], scheduler.sigmas[2::2]]).double().unique().flip(0)
    x = figure("x_T", "samplers.npz") * sigmas[0]
    expected = theirs(monkeypatch, scheduler, x, case.eta)
    found = solve(case.name, Known(), x, sigmas, noise=noise_of(7, SHAPE), **case.settings)
    assert len(sigmas) == 13
    assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("steps", [12, 16])
@pytest.mark.parametrize("case", [
    Case("dpmpp_2m", {}, "DPMSolverMultistepScheduler", PLUS),
    Case("dpmpp_2m_sde", {}, "DPMSolverMultistepScheduler", SDE),
    Case("dpmpp_2m_sde_heun", {}, "DPMSolverMultistepScheduler", {**SDE, "solver_type": "heun"}),
    Case("dpmpp_3m_sde", {"eta": 0}, "DPMSolverMultistepScheduler",
         {**PLUS, "solver_order": 3, "solver_type": "heun", "lower_order_final": False}),
    Case("unipc", {}, "UniPCMultistepScheduler", {**TRAILING, "final_sigmas_type": "zero"}),
    Case("unipc", {"order": 3}, "UniPCMultistepScheduler",
         {**TRAILING, "final_sigmas_type": "zero", "solver_order": 3}),
    Case("unipc", {"order": 1}, "UniPCMultistepScheduler",
         {**TRAILING, "final_sigmas_type": "zero", "solver_order": 1}),
    Case("unipc_bh1", {}, "UniPCMultistepScheduler",
         {**TRAILING, "final_sigmas_type": "sigma_min", "solver_order": 3, "solver_type": "bh1"}),
    Case("unipc_bh1", {"order": 2}, "UniPCMultistepScheduler",
         {**TRAILING, "final_sigmas_type": "sigma_min", "solver_order": 2, "solver_type": "bh1"}),
    Case("unipc_bh2", {}, "UniPCMultistepScheduler",
         {**TRAILING, "final_sigmas_type": "zero", "solver_order": 3}),
    Case("deis", {}, "DEISMultistepScheduler", TRAILING),
    Case("deis", {"order": 3}, "DEISMultistepScheduler", {**TRAILING, "solver_order": 3}),
])  # fmt: skip
def test_schedulers_in_the_originals_scale(schedulers, monkeypatch, case, steps):
    scheduler = getattr(schedulers, case.scheduler)(**SCHEDULE, **case.options)
    scheduler.set_timesteps(steps)
    sigmas = scheduler.sigmas.double()
    x = figure("x_T", "samplers.npz")
    expected = theirs(monkeypatch, scheduler, x, case.eta) * (1 + sigmas[-1] ** 2) ** 0.5
    found = solve(
        case.name, Known(), x * (1 + sigmas[0] ** 2) ** 0.5, sigmas, noise=noise_of(7, SHAPE), **case.settings
    )
    assert relative_error(found, expected) < 1e-5


class Numbers:
    """Our source of the noise that they are given."""

    def __init__(self) -> None:
        self.arrays = noise_of(7, SHAPE)

    def draw(self, shape: tuple[int, ...]) -> Tensor:
        return torch.from_numpy(next(self.arrays))

    def skip(self, shape: tuple[int, ...]) -> None:
        pass


@pytest.mark.parametrize("steps", [1, 4, 8])
@pytest.mark.parametrize("case", [
    Case("lcm", {}, "LCMScheduler", {}),
    Case("tcd", {}, "TCDScheduler", {}, 0.3),
    Case("tcd", {"eta": 1.0}, "TCDScheduler", {}, 1.0),
    Case("tcd", {"eta": 0.0}, "TCDScheduler", {}, 0.0),
    Case("ddim", {}, "DDIMScheduler", {**TRAILING, "clip_sample": False}),
    Case("ddpm", {}, "DDPMScheduler", {**TRAILING, "clip_sample": False}),
])  # fmt: skip
def test_schedulers_on_trained_timesteps(schedulers, monkeypatch, case, steps):
    scheduler = getattr(schedulers, case.scheduler)(**SCHEDULE, **case.options)
    scheduler.set_timesteps(steps)
    schedule = None if case.name in ("lcm", "tcd") else Schedule("trailing")
    sampler = SOLVERS[case.name].make(Known(), schedule, **case.settings)
    sampler.make_schedule(steps, verbose=False)
    assert sampler.table.timesteps.tolist() == scheduler.timesteps.tolist()[::-1]
    x = figure("x_T", "samplers.npz")
    expected = theirs(monkeypatch, scheduler, x, case.eta)
    found = sampler.decode(sampler.starting(x), None, steps, noise=Numbers())
    assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("name", ["lcm", "tcd"])
@pytest.mark.parametrize(("strength", "steps"), [(0.5, 4), (0.8, 3), (0.3, 15)])
def test_an_image_is_the_start_of_a_few_steps(schedulers, monkeypatch, name, strength, steps):
    """All steps run, on the share of the trained timesteps that the strength is, as in their pipeline for images."""
    scheduler = getattr(schedulers, f"{name.upper()}Scheduler")(**SCHEDULE)
    scheduler.set_timesteps(steps, strength=strength)
    job = Job("", sampler=name, steps=steps, strength=strength, init=Init("a.png"))
    (one,) = passes_of(job)
    sampler = SOLVERS[name].make(Known(), schedule_of(job, one.share))
    sampler.make_schedule(steps, verbose=False)
    assert sampler.table.timesteps.tolist() == scheduler.timesteps.tolist()[::-1] and one.steps == steps
    noise, image = figure("x_T", "samplers.npz"), torch.full(SHAPE, 0.7, dtype=torch.float64)
    x = scheduler.add_noise(image, noise, scheduler.timesteps[:1])
    expected = theirs(monkeypatch, scheduler, x, 0.3 if name == "tcd" else None)
    found = sampler.decode(sampler.start_from(image, one.steps, noise), None, one.steps, noise=Numbers())
    assert relative_error(found, expected) < 1e-5


def test_ipndm(schedulers, monkeypatch):
    """Its scheduler has levels of its own and a model that predicts v; it is given ours."""
    sigmas = torch.tensor([14.0, 6, 3, 1.5, 0.7, 0.3, 0.1, 0], dtype=torch.float64)
    scheduler = schedulers.IPNDMScheduler()
    scheduler.set_timesteps(7)
    scheduler.alphas = 1 / (1 + sigmas**2) ** 0.5
    scheduler.betas = sigmas * scheduler.alphas
    model, x = Known(), figure("x_T", "samplers.npz")
    latents = x
    for i, t in enumerate(scheduler.timesteps):
        time = np.interp(np.log(float(sigmas[i])), np.log(SIGMAS), np.arange(1000))
        eps = model.apply_model(latents, torch.full((2,), time, dtype=torch.float64), None)
        v = (eps - scheduler.betas[i] * latents) / scheduler.alphas[i]
        latents = scheduler.step(v, t, latents).prev_sample
    found = solve("ipndm", model, x * (1 + sigmas[0] ** 2) ** 0.5, sigmas)
    assert relative_error(found, latents) < 1e-5


def test_lms(schedulers, monkeypatch):
    pytest.importorskip("scipy")
    scheduler = schedulers.LMSDiscreteScheduler(**SCHEDULE, **TRAILING)
    scheduler.set_timesteps(12)
    x = figure("x_T", "samplers.npz") * scheduler.sigmas[0]
    expected = theirs(monkeypatch, scheduler, x, None)
    assert relative_error(solve("lms", Known(), x, scheduler.sigmas.double()), expected) < 1e-5
