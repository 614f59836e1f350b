"""The infotext: of this toolkit, of AUTOMATIC1111's web UI and its forks, and of stable-diffusion.cpp.

The web UI and stable-diffusion.cpp read weights, BREAK and more than 75 tokens in every prompt, so their jobs have
the syntax "a1111" always: a prompt without any of it gives the same conditioning bit for bit in either syntax, and
whether it has more tokens than 75 only a model's tokenizer can say.
"""

from __future__ import annotations

import math
import re

from ldm.images.foreign.own import recipe
from ldm.images.foreign.recipe import UNKNOWN, Draft, Origin, Recipe
from ldm.images.metadata import JOB_KEYS, job_from_entries, parse_infotext
from ldm.util import InputError

_CPP = "stable-diffusion.cpp"
_CPP_RECORD = ", SDCPP: {"  # JSON that follows the entries unquoted
_CPP_NOISE = {"cuda": "NV", "cpu": "CPU"}
# entries that change nothing, or nothing at these values; every other one that the job has no field for is noted
_SILENT = {
    "Version", "User", "Model", "Model hash", "Schedule type", "Lora hashes", "Guidance", "Batch size", "Batch pos",
}  # fmt: skip
_HARMLESS = {("Clip skip", "1"), ("ENSD", "0"), ("Emphasis", "Original"), ("Emphasis", "None")}
_FOREIGN_KEYS = JOB_KEYS & {
    "Prompt", "Negative prompt", "Steps", "Sampler", "CFG scale", "Seed", "Size-1", "Size-2", "Eta DDIM", "RNG",
    "Denoising strength", "Hires upscale", "Hires upscaler", "Loras",
}  # fmt: skip


def read(text: str, _: Origin = UNKNOWN) -> Recipe:
    """The recipe of a picture with an infotext; its `Version` says whose it is."""
    if text.lstrip().startswith("{"):
        raise InputError("it is JSON, as Fooocus writes it, which is not read here")
    entries = parse_infotext(text.partition(_CPP_RECORD)[0])
    version = entries.get("Version", "")
    if version.startswith("ldm "):
        return recipe(job_from_entries(entries), {k: v for k, v in entries.items() if k not in JOB_KEYS}, [])
    if version.startswith(_CPP):
        return _recipe(_cpp_as_web_ui(entries), _CPP)
    return _recipe(entries, "A1111")


def _recipe(entries: dict[str, str], source: str) -> Recipe:
    draft = Draft(source)
    hires = _hires(entries, draft)
    known = {key: value for key, value in entries.items() if key in _FOREIGN_KEYS}
    if known.get("Seed", "").startswith("-"):
        draft.note(f"seed {known.pop('Seed')} stands for any; 42 is taken")
    job = job_from_entries(known)
    draft.values |= {
        name: getattr(job, name)
        for name in ("prompt", "negative_prompt", "seed", "width", "height", "steps", "scale", "eta")
    }
    # the emphasis None is the web UI's word for brackets that are text
    draft.values["prompt_syntax"] = "plain" if entries.get("Emphasis") == "None" else "a1111"
    draft.loras += job.loras
    draft.sampler(entries.get("Sampler", ""))
    if known.get("Eta DDIM") and draft.values["sampler"] == "ddim":
        draft.values["eta"] = job.eta
    for key in ("Seed", "Size-1"):
        if key not in entries:
            draft.note(f"{key.removesuffix('-1').lower()} is not said; the default is taken")
    _choose_noise(entries, draft)
    _choose_timesteps(entries, draft)
    if hires:
        draft.values |= {"upscale": job.upscale, "upscale_in": job.upscale_in}
        draft.number("upscale_strength", job.strength if "Denoising strength" in known else None)
    elif "Denoising strength" in known:
        draft.start_from("", job.strength)
    draft.model, draft.model_hash = entries.get("Model", ""), entries.get("Model hash", "")
    for key in sorted(entries.keys() - _FOREIGN_KEYS - _SILENT):
        if (key, entries[key]) not in _HARMLESS:
            draft.leave_out(key, entries[key])
    return draft.finish()


def _hires(entries: dict[str, str], draft: Draft) -> bool:
    """Whether there is a second pass; a size that it is brought to becomes a factor of the first pass's."""
    first = [entries.pop(f"First pass size-{side}", "0") for side in (1, 2)]  # versions before 2023
    wanted = [entries.pop(f"Hires resize-{side}", "0") for side in (1, 2)]
    if _positive(first):
        wanted = [entries.get(f"Size-{side}", "0") for side in (1, 2)]
        entries |= {"Size-1": first[0], "Size-2": first[1]}
    width = entries.get("Size-1", "0")
    if "Hires upscale" not in entries and _positive([*wanted[:1], width]):
        entries["Hires upscale"] = str(int(wanted[0]) / int(width))
    upscaler = entries.get("Hires upscaler", "")
    if upscaler not in ("", "Lanczos", "Latent"):
        draft.note(
            f"upscaler {upscaler} is not here; {'bilinear' if 'Latent' in upscaler else 'Lanczos'} is taken"
        )
    return "Hires upscale" in entries


def _positive(numbers: list[str]) -> bool:
    return all(re.fullmatch("0*[1-9][0-9]{0,5}", number) for number in numbers)


def _choose_noise(entries: dict[str, str], draft: Draft) -> None:
    """A generator for each picture, on the GPU unless it is said; an NVIDIA card's noise is taken for any GPU's."""
    rng = entries.get("RNG", "")
    if rng == "CPU":
        draft.cpu_noise()
    elif rng not in ("", "GPU", "NV"):
        draft.note(f"noise generator {rng[:50]} is not here; an NVIDIA card's is taken")
    elif rng != "NV":
        draft.note("its noise is taken to be an NVIDIA card's; another GPU's would differ")


def _choose_timesteps(entries: dict[str, str], draft: Draft) -> None:
    schedule = entries.get("Schedule type", "Automatic")
    if schedule not in ("Automatic", "Uniform", "DDIM"):
        draft.note(f"schedule {schedule[:50]} is not here; the sampler's own is taken")
    if draft.source == "A1111" and entries.get("Sampler") in ("DDIM", "PLMS"):
        draft.spacing_of_compvis()
        if _version(entries) >= (1, 6):
            draft.note(
                "since version 1.6 the web UI leaves the last step of DDIM and PLMS out; here it is taken"
            )


def _version(entries: dict[str, str]) -> tuple[int, ...]:
    """The web UI's version, from v1.10.1 or v1.10.1-12-gabcdef; forks' and unknown ones count as new."""
    parts = entries.get("Version", "").removeprefix("v").partition("-")[0].split(".")
    return tuple(map(int, parts)) if all(part.isdecimal() and len(part) < 5 for part in parts) else (1, 6)


def _cpp_as_web_ui(entries: dict[str, str]) -> dict[str, str]:
    """The entries under the web UI's names; one that has no counterpart stays, and is noted later."""
    entries = dict(entries)
    sampler, _, schedule = entries.get("Sampler", "").partition(" ")
    entries |= {"Sampler": sampler, "Schedule type": schedule or "Automatic"}
    entries["RNG"] = _CPP_NOISE.get(entries.get("RNG", "cuda"), entries.get("RNG", ""))
    upscaler = entries.pop("Hires upscale", "")
    if "Hires scale" in entries:
        entries |= {"Hires upscaler": upscaler, "Hires upscale": entries.pop("Hires scale")}
    eta = entries.pop("Eta", "0")
    try:
        if math.isfinite(float(eta)) and float(eta) > 0:
            entries["Eta DDIM"] = eta
    except ValueError:
        entries["Eta"] = eta
    return entries
