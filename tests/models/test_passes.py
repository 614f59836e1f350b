"""The schedule, settings and passes of a job, against the rules that other programs publish."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from ldm.job import Init, Job
from ldm.models.diffusion.passes import (
    begun_without_signal,
    check_sampling,
    passes_of,
    schedule_length,
    schedule_of,
    settings_of,
)
from ldm.models.diffusion.schedule import diffusion_buffers, make_beta_schedule, zero_terminal_snr
from ldm.runs.checks import suit_to
from ldm.util import InputError

ALPHAS = diffusion_buffers(make_beta_schedule("linear", 1000, 0.00085, 0.012))["alphas_cumprod"]


def zero_terminal_snr_alphas() -> np.ndarray:
    return diffusion_buffers(zero_terminal_snr(make_beta_schedule("linear", 1000, 0.00085, 0.012)))[
        "alphas_cumprod"
    ]


def sigmas(job: Job) -> np.ndarray:
    alphas = schedule_of(job).levels(job.steps, ALPHAS).alphas
    return np.sqrt((1 - alphas) / alphas)


def karras(count: int) -> np.ndarray:
    """The formula of Karras et al. 2022, equation 5, between the ends of v1's schedule, and 0."""
    trained = np.sqrt((1 - ALPHAS) / ALPHAS)
    ramp = np.linspace(trained[-1] ** (1 / 7), trained[0] ** (1 / 7), count)
    return np.append(ramp**7, 0)


def test_a_job_names_its_schedule() -> None:
    job = Job("x", sampler="dpm2", schedule="karras", steps=10)
    assert np.allclose(sigmas(job), karras(10), rtol=1e-9)


@pytest.mark.parametrize(
    ("sampler", "convention"), [("dpm2", "a1111"), ("dpm2_a", "comfyui"), ("dpmpp_3m_sde", "a1111")]
)
def test_programs_leave_out_the_level_before_the_last(sampler: str, convention: str) -> None:
    job = Job("x", sampler=sampler, schedule="karras", steps=10, convention=convention)  # type: ignore[arg-type]
    assert np.allclose(sigmas(job), np.delete(karras(11), -2), rtol=1e-9)


def test_comfyui_calls_the_model_at_whole_timesteps() -> None:
    times = {
        name: schedule_of(Job("x", sampler="euler", schedule="karras", steps=7, convention=name)).levels(
            7, ALPHAS
        )  # type: ignore[arg-type]
        for name in ("ldm", "comfyui")
    }
    assert np.array_equal(times["comfyui"].timesteps, np.round(times["comfyui"].timesteps))
    assert not np.array_equal(times["ldm"].timesteps, np.round(times["ldm"].timesteps))
    assert np.allclose(times["ldm"].timesteps, times["comfyui"].timesteps, atol=1)


def test_levels_of_the_user() -> None:
    job = Job("x", sampler="euler", sigmas=(10.0, 2.0, 0.5, 0.0), steps=50)
    assert np.allclose(sigmas(job), job.sigmas) and schedule_length(job) == 3
    assert [one.steps for one in passes_of(job)] == [3]
    assert np.allclose(sigmas(Job("x", sampler="euler", sigmas=job.sigmas[:-1])), job.sigmas)
    job = Job("x", sampler="euler", timesteps=(999.0, 500.0), steps=50)
    assert np.allclose(schedule_of(job).levels(50, ALPHAS).timesteps, job.timesteps)


@pytest.mark.parametrize(
    ("convention", "strength", "steps"), [("ldm", 0.75, 15), ("a1111", 0.75, 16), ("a1111", 1, 20)]
)
def test_steps_of_image_to_image(convention: str, strength: float, steps: int) -> None:
    job = Job("x", sampler="euler", steps=20, strength=strength, init=Init("a.png"), convention=convention)  # type: ignore[arg-type]
    assert passes_of(job)[0].steps == steps


def test_all_steps_of_a_few_run_from_an_image() -> None:
    job = Job(
        "x", sampler="lcm", steps=4, strength=0.5, init=Init("a.png"), upscale=2.0, upscale_strength=0.3
    )
    assert [(one.steps, one.share) for one in passes_of(job)] == [(4, 0.5), (4, 0.3)]
    web_ui = passes_of(dataclasses.replace(job, convention="a1111", upscale=1.0))
    assert [(one.steps, one.share) for one in web_ui] == [(3, 1.0)]
    assert passes_of(dataclasses.replace(job, strength=0.0))[0].steps == 0


def test_calls_of_the_model() -> None:
    calls = {
        name: passes_of(Job("x", sampler=name, steps=10))[0].model_calls(name)
        for name in ("euler", "heun", "plms")
    }
    assert calls == {"euler": 10, "heun": 19, "plms": 11}


@pytest.mark.parametrize("values", [{}, {"sampler": "plms"}, {"sampler": "ddpm"}])
def test_a_model_without_signal_at_the_end_begins_there(values: dict[str, object]) -> None:
    job = begun_without_signal(Job("x", steps=10, **values))  # type: ignore[arg-type]
    levels = schedule_of(job).levels(10, zero_terminal_snr_alphas())
    assert job.schedule == "trailing" and levels.timesteps[0] == 999 and levels.alphas[0] == 0
    assert schedule_of(Job("x", steps=10)).levels(10, ALPHAS).timesteps[0] < 999


@pytest.mark.parametrize(
    "values",
    [
        {"schedule": "original"}, {"timestep_spacing": "compvis"}, {"timesteps": (900.0,)}, {"sampler": "euler"},
        {"sampler": "dpm_solver"}, {"sampler": "lcm"},
    ],
)  # fmt: skip
def test_what_is_chosen_or_begins_there_is_kept(values: dict[str, object]) -> None:
    job = Job("x", **values)  # type: ignore[arg-type]
    assert begun_without_signal(job) == job


def test_runs_choose_it_by_the_config() -> None:
    assert suit_to({"params": {"zero_terminal_snr": True}})(Job("x")).schedule == "trailing"
    assert suit_to({"params": {}})(Job("x")) == Job("x")


def test_only_what_is_not_usual_is_a_setting() -> None:
    assert settings_of(Job("x", sampler="euler_a", eta=1.0)) == {}
    assert settings_of(Job("x", sampler="euler_a", eta=0.5, s_noise=1.01)) == {"eta": 0.5, "s_noise": 1.01}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sampler": "plms", "eta": 0.5}, "plms does not use --ddim_eta, here 0.5; .*: ddim, euler_a"),
        ({"sampler": "lms", "s_churn": 4.0}, "lms does not use --s_churn, here 4; .*: euler, heun, dpm2"),
        ({"sigmas": (3.0, 0.0), "timesteps": (9.0,)}, "--sigmas and --timesteps contradict"),
        ({"sampler": "euler", "timestep_spacing": "quad"}, "--timestep_spacing quad goes with ddim and plms"),
        ({"sampler": "euler", "sigmas": (1.0, 3.0, 0.0)}, "must fall"),
        ({"sampler": "lcm", "steps": 60}, "60 steps are not possible"),
        (
            {"sampler": "lcm", "steps": 4, "strength": 0.05, "init": Init("a.png")},
            "4 steps .* 0.05; give 1 to 2",
        ),
        ({"sampler": "tcd", "steps": 4, "strength": 0.01, "init": Init("a.png")}, "0.01; give at least 0.02"),
    ],
)
def test_what_does_not_fit_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_sampling(Job("x", **values))  # type: ignore[arg-type]
