"""Names of samplers and schedules in other programs, against hand-made lists of what those programs offer."""

from __future__ import annotations

import pytest

from ldm.fields import SETTINGS
from ldm.job import Job
from ldm.job_values import override
from ldm.models.diffusion.solvers import SOLVERS
from ldm.models.diffusion.solvers.names import SOLVER_LABELS, find_schedule, find_solver


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # AUTOMATIC1111's web UI, with the schedule in the name before version 1.9
        ("Euler", "euler"), ("Euler a", "euler_a"), ("Heun", "heun"), ("LMS", "lms"), ("LMS Karras", "lms/karras"),
        ("DPM2", "dpm2"), ("DPM2 a Karras", "dpm2_a/karras"), ("DPM++ 2M", "dpmpp_2m"), ("PLMS", "plms"),
        ("DPM++ 2M Karras", "dpmpp_2m/karras"), ("DPM++ 2S a Karras", "dpmpp_2s_a/karras"), ("DDIM", "ddim"),
        ("DPM++ SDE Karras", "dpmpp_sde/karras"), ("DPM++ 2M SDE Exponential", "dpmpp_2m_sde/exponential"),
        ("DPM++ 2M SDE Heun Karras", "dpmpp_2m_sde_heun/karras"), ("DPM++ 3M SDE", "dpmpp_3m_sde"),
        ("UniPC", "unipc"), ("LCM", "lcm"),
        # ComfyUI
        ("euler_ancestral", "euler_a"), ("dpm_2", "dpm2"), ("dpm_2_ancestral", "dpm2_a"), ("dpmpp_2m", "dpmpp_2m"),
        ("dpmpp_2s_ancestral", "dpmpp_2s_a"), ("dpmpp_sde_gpu", "dpmpp_sde"), ("dpmpp_2m_sde_gpu", "dpmpp_2m_sde"),
        ("uni_pc_bh2", "unipc_bh2"), ("deis", "deis"), ("ddpm", "ddpm"), ("er_sde", "er_sde"),
        # InvokeAI, old and new
        ("k_euler_a", "euler_a"), ("k_dpmpp_2m", "dpmpp_2m"), ("k_lms", "lms"), ("k_dpm_2_a", "dpm2_a"),
        ("dpmpp_2m_k", "dpmpp_2m/karras"), ("kdpm_2_a_k", "dpm2_a/karras"), ("euler_k", "euler/karras"),
        ("unipc_k", "unipc/karras"), ("dpmpp_2m_sde_k", "dpmpp_2m_sde/karras"),
        # stable-diffusion.cpp and kohya
        ("dpm++2m karras", "dpmpp_2m/karras"), ("dpm++2s_a", "dpmpp_2s_a"), ("tcd", "tcd"), ("pndm", "plms"),
        # k-diffusion's functions and diffusers' classes
        ("sample_heun", "heun"), ("EulerAncestralDiscreteScheduler", "euler_a"), ("LMSDiscreteScheduler", "lms"),
        ("UniPCMultistepScheduler", "unipc"), ("LCMScheduler", "lcm"), ("KDPM2DiscreteScheduler", "dpm2"),
    ],
)  # fmt: skip
def test_a_name_is_found(name: str, expected: str) -> None:
    assert str(find_solver(name)) == expected
    solver, _, schedule = expected.partition("/")
    job = override(Job("x"), {"sampler": SETTINGS["sampler"].read(name)})
    assert (job.sampler, job.schedule) == (solver, schedule or "auto")


@pytest.mark.parametrize(
    "name", ["DPM fast", "euler_cfg_pp", "heunpp2", "sa_solver", "karras", "", "x" * 1000]
)
def test_what_is_not_here_is_not_found(name: str) -> None:
    assert find_solver(name) is None


def test_schedules() -> None:
    found = {
        "Karras": "karras", "SGM Uniform": "sgm_uniform", "KL Optimal": "kl_optimal", "DDIM": "ddim_uniform",
        "Align Your Steps": "align_your_steps", "ays": "align_your_steps", "discrete": "uniform", "Automatic": "",
        "KarrasScheduler": "karras", "normal": "normal", "gits": None,
    }  # fmt: skip
    assert {name: find_schedule(name) for name in found} == found


def test_names_go_both_ways() -> None:
    found = {name: str(find_solver(label)) for name, label in SOLVER_LABELS.items()}
    # in the web UI UniPC is the authors' code, elsewhere a name of the method
    assert found.pop("unipc_bh1") == "unipc" and found == {name: name for name in found}
    assert [str(find_solver(name)) for name in SOLVERS] == list(SOLVERS)


def test_a_schedule_that_is_given_goes_before_that_of_the_name() -> None:
    job = override(Job("x"), {"sampler": "dpmpp_2m/karras", "schedule": "beta"})
    assert (job.sampler, job.schedule) == ("dpmpp_2m", "beta")
