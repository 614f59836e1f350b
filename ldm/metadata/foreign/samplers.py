"""The samplers, schedules and conventions of other programs, as they are named in their files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from ldm.metadata.recipe import Draft
from ldm.models.diffusion.solvers.names import Named, find_schedule, find_solver, plain
from ldm.models.diffusion.solvers.registry import SOLVERS

# Part of a plain name that is not known, and the nearest sampler here. The first match is used.
_NEAREST = (
    ("plms", "plms"), ("pndm", "plms"), ("eulera", "euler_a"), ("2sa", "dpmpp_2s_a"), ("dpm2a", "dpm2_a"),
    ("ancestral", "euler_a"), ("3msde", "dpmpp_3m_sde"), ("2msde", "dpmpp_2m_sde"), ("sde", "dpmpp_sde"),
    ("ddpm", "ddpm"), ("lcm", "lcm"), ("ddim", "ddim"), ("euler", "euler"), ("lms", "lms"), ("heun", "heun"),
    ("unipc", "unipc"), ("", "dpmpp_2m"),
)  # fmt: skip
_OF_THE_ORIGINAL = ("ddim", "plms")
_OWN_TIMES = ("", "uniform", "ddim_uniform")  # schedules that are those of the original's samplers
_TREES = ("dpmpp_sde", "dpmpp_2m_sde", "dpmpp_2m_sde_heun", "dpmpp_3m_sde")  # k-diffusion's Brownian tree
_TWO_MEANINGS = ("beta", "kl_optimal", "align_your_steps")


class Program(NamedTuple):
    """How a program means the names of its files.

    `convention` is one of `CONVENTIONS`. `automatic` are the schedules that its samplers have where none is named.
    `same_steps`: the noise of a step is drawn there as here.
    """

    name: str
    convention: str = "ldm"
    automatic: Mapping[str, str] = {}
    same_steps: bool = False


_KARRAS = dict.fromkeys(("dpmpp_2m", "dpmpp_sde", "dpmpp_2s_a", "dpm2", "dpm2_a"), "karras")
_EXPONENTIAL = dict.fromkeys(("dpmpp_2m_sde", "dpmpp_2m_sde_heun", "dpmpp_3m_sde"), "exponential")
WEB_UI = Program("A1111", "a1111", {**_KARRAS, **_EXPONENTIAL}, same_steps=True)
OLD_WEB_UI = WEB_UI._replace(automatic={})  # before version 1.9, which wrote no entry for the schedule
COMFYUI = Program("ComfyUI", "comfyui")
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
    _note_differences(draft, sampler, program)


def _set_schedule(draft: Draft, sampler: str, schedule: str, program: Program) -> None:
    if program.convention == "a1111" and schedule in _TWO_MEANINGS:
        schedule = f"{schedule}_a1111"
    if schedule and schedule != SOLVERS[sampler].schedule:
        draft.values["schedule"] = schedule
    if sampler not in _OF_THE_ORIGINAL or schedule:
        draft.values["convention"] = program.convention


def _note_differences(draft: Draft, sampler: str, program: Program) -> None:
    """Notes what is not the same although the names are."""
    if sampler == "unipc":
        draft.note("its UniPC is of order 3 or of another form; here it is of order 2")
    if sampler in _TREES:
        draft.note(
            "its steps draw their noise from a Brownian tree; here it comes from the image's own stream"
        )
    elif SOLVERS[sampler].draws and not program.same_steps:
        draft.note(
            "its steps draw their noise from another generator; here it comes from the image's own stream"
        )
