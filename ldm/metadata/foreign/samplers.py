"""The samplers, schedules and conventions of other programs, as they are named in their files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from ldm.metadata.recipe import Draft
from ldm.models.diffusion.passes import CONVENTIONS
from ldm.models.diffusion.solvers.names import Named, find_schedule, find_solver, plain
from ldm.models.diffusion.solvers.registry import SOLVERS

# Part of a plain name that is not known, and the nearest sampler here. The first match is used.
_NEAREST = (
    ("plms", "plms"), ("pndm", "plms"), ("eulera", "euler_a"), ("2sa", "dpmpp_2s_a"), ("dpm2a", "dpm2_a"),
    ("ancestral", "euler_a"), ("3msde", "dpmpp_3m_sde"), ("2msde", "dpmpp_2m_sde"), ("sde", "dpmpp_sde"),
    ("ddpm", "ddpm"), ("lcm", "lcm"), ("ddim", "ddim"), ("euler", "euler"), ("lms", "lms"), ("heun", "heun"),
    ("unipc", "unipc_bh1"), ("", "dpmpp_2m"),
)  # fmt: skip
_OF_THE_ORIGINAL = ("ddim", "plms")
_OWN_TIMES = ("", "uniform", "ddim_uniform")  # schedules that are those of the original's samplers
_TWO_MEANINGS = ("beta", "kl_optimal", "align_your_steps")


class Program(NamedTuple):
    """How a program means the names of its files.

    `convention` is one of `CONVENTIONS`. `automatic` are the schedules that its samplers have where none is named.
    `same_steps`: the noise of steps comes from the image's stream, as here. `step_rng` is the generator of its own
    that has that noise, where the convention has no Brownian path or the sampler's name ends in gpu.
    """

    name: str
    convention: str = "ldm"
    automatic: Mapping[str, str] = {}
    same_steps: bool = False
    step_rng: str = ""


_KARRAS = dict.fromkeys(("dpmpp_2m", "dpmpp_sde", "dpmpp_2s_a", "dpm2", "dpm2_a"), "karras")
_EXPONENTIAL = dict.fromkeys(("dpmpp_2m_sde", "dpmpp_2m_sde_heun", "dpmpp_3m_sde"), "exponential")
WEB_UI = Program("A1111", "a1111", {**_KARRAS, **_EXPONENTIAL}, same_steps=True)
OLD_WEB_UI = WEB_UI._replace(automatic={})  # before version 1.9, which wrote no entry for the schedule
COMFYUI = Program("ComfyUI", "comfyui", step_rng="philox")
CPP = Program("stable-diffusion.cpp", same_steps=True)
OTHER = Program("")


def choose_sampler(draft: Draft, name: str, schedule: str = "", program: Program = OTHER) -> None:
    """Sets sampler, schedule and convention by the names of another program, or the nearest ones with a note."""
    named, given = find_solver(name), find_schedule(schedule)
    if named is None:
        named = Named(next(own for part, own in _NEAREST if part in plain(name)[:100]))
        shown = f"sampler {name[:100]} is not supported" if name else "its sampler is not given"
        draft.note(f"{shown}; using {named.sampler}")
    sampler = named.sampler
    if sampler == "unipc" and program.convention != "ldm":
        sampler = (
            "unipc_bh1"  # of the authors' code, in the web UI on their timesteps whatever schedule is chosen
        )
        given = "" if program.convention == "a1111" else given
    draft.values |= {"sampler": sampler, "eta": None}
    if sampler in _OF_THE_ORIGINAL:
        if program.convention != "comfyui" and given == "normal":
            given = ""
        if given in _OWN_TIMES or program.convention == "a1111":
            if given not in _OWN_TIMES:
                draft.note(
                    f"schedule {schedule[:50]} is not supported with {sampler}; using the sampler's own"
                )
            return
    if given is None:
        draft.note(f"schedule {schedule[:50]} is not supported; using the sampler's own")
    _set_schedule(draft, sampler, given or named.schedule or program.automatic.get(sampler, ""), program)
    if SOLVERS[sampler].draws and not program.same_steps:
        _choose_step_noise(draft, sampler, name, program)


def _set_schedule(draft: Draft, sampler: str, schedule: str, program: Program) -> None:
    if program.convention == "a1111" and schedule in _TWO_MEANINGS:
        schedule = f"{schedule}_a1111"
    if schedule and schedule != SOLVERS[sampler].schedule:
        draft.values["schedule"] = schedule
    if sampler not in _OF_THE_ORIGINAL or schedule:
        draft.values["convention"] = program.convention


def _choose_step_noise(draft: Draft, sampler: str, name: str, program: Program) -> None:
    if not program.step_rng:
        draft.note(
            "its steps draw their noise from another generator; here it comes from the image's own stream"
        )
    elif sampler not in CONVENTIONS[program.convention].brownian:
        draft.values["step_rng"] = program.step_rng
        draft.note("the noise of its steps is assumed to be an NVIDIA card's; another device's would differ")
    elif plain(name).endswith("gpu"):
        draft.values["step_rng"] = program.step_rng


def steps_of_batch(draft: Draft) -> None:
    """Notes, for an image of a batch with one stream of noise, that its steps have other noise here."""
    sampler = draft.values.get("sampler", "")
    if draft.values.get("seed_mode") == "batch" and sampler in SOLVERS and SOLVERS[sampler].draws:
        draft.values.pop("step_rng", None)
        draft.note(
            "the noise of its steps was drawn for the whole batch; here it comes from the run's stream"
        )
