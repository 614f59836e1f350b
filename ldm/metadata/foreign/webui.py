"""Reads the infotext of this toolkit, of AUTOMATIC1111's web UI and its forks, and of other programs.

The web UI and stable-diffusion.cpp read weights, BREAK and more than 75 tokens in every prompt, so their jobs have
the syntax "a1111" always: a prompt without these has the same conditioning bit for bit in either syntax, and
only a model's tokenizer can count its tokens.
"""

from __future__ import annotations

from collections.abc import Mapping

from ldm.job import Job
from ldm.metadata.foreign.controls import read_controls
from ldm.metadata.foreign.entries import (
    FOREIGN_KEYS,
    HARMLESS,
    NOTHING,
    SILENT,
    named_entries,
    positive,
    tidy,
)
from ldm.metadata.foreign.files import find_files, listed_hashes
from ldm.metadata.foreign.passes import choose_start, second_pass
from ldm.metadata.foreign.samplers import COMFYUI, CPP, OLD_WEB_UI, WEB_UI, Program, choose_sampler
from ldm.metadata.infotext import JOB_KEYS, job_from_entries, parse_infotext
from ldm.metadata.read_own import recipe
from ldm.metadata.recipe import UNKNOWN, Draft, Origin, Recipe
from ldm.models.diffusion.solvers.registry import SOLVERS
from ldm.prompts.editing import changes_or_joins
from ldm.util import InputError

_CPP = "stable-diffusion.cpp"
_CPP_NOISE = {"cuda": "NV", "cpu": "CPU"}
_USUAL_PADDING = 32  # of the web UI
_ON_THE_CPU = ("ComfyUI", "Fooocus")  # programs that draw noise there, as their `Version` begins


def read(text: str, origin: Origin = UNKNOWN) -> Recipe:
    """Reads the recipe of an image with an infotext; its `Version` identifies the program."""
    if text.lstrip().startswith("{"):
        raise InputError("it is JSON of a program that is not supported")
    entries = parse_infotext(text)
    version = entries.get("Version", "")
    if version.startswith("ldm "):
        return recipe(job_from_entries(entries), {k: v for k, v in entries.items() if k not in JOB_KEYS}, [])
    entries = named_entries(parse_infotext(tidy(text)))
    if version.startswith(_CPP):
        return _recipe(_cpp_as_web_ui(entries), _CPP, origin)
    if "Seed Mode" in entries:
        return _recipe(_draw_things_as_web_ui(entries), "Draw Things", origin)
    programs = [name for name in _ON_THE_CPU if version.lower().startswith(name.lower())]
    source = programs[0] if programs else "SD.Next" if entries.get("App") == "SD.Next" else "A1111"
    return _recipe(_as_web_ui(entries), source, origin)


def _recipe(entries: dict[str, str], source: str, origin: Origin) -> Recipe:
    draft = Draft(source)
    if "Steps" not in entries and {"Seed", "Sampler"} & entries.keys():
        draft.note("its count of steps is not given; using 50")
        entries["Steps"] = "50"
    hires = second_pass(entries, origin, draft)
    known = {key: value for key, value in entries.items() if key in FOREIGN_KEYS}
    if known.get("Seed", "").startswith("-"):
        draft.note(f"a random seed was asked for ({known.pop('Seed')}); using 42")
    if known.get("Clip skip", "1") in ("0", "-1"):  # as some programs write that nothing is skipped
        del known["Clip skip"]
    job = job_from_entries(known)
    draft.values |= {
        name: getattr(job, name)
        for name in (
            "prompt",
            "negative_prompt",
            "seed",
            "width",
            "height",
            "steps",
            "scale",
            "eta",
            "clip_skip",
            "image_scale",
        )
    }
    _choose_size(entries, origin, job.upscale, draft)
    if source not in _ON_THE_CPU:
        # with the emphasis None the web UI reads brackets as text
        draft.values["prompt_syntax"] = "plain" if entries.get("Emphasis") == "None" else "a1111"
    if source == _CPP and changes_or_joins(job.prompt, job.negative_prompt):
        draft.values["prompt_syntax"] = "plain"
        draft.note("its prompts are read as plain text: what changes a prompt or joins two is text in it")
    draft.loras += job.loras
    choose_sampler(
        draft, entries.get("Sampler", ""), entries.get("Schedule type", ""), _program(entries, source)
    )
    if known.get("Eta DDIM") and "eta" in SOLVERS[draft.values["sampler"]].settings:
        draft.values["eta"] = job.eta
    _choose_step_settings(job, draft)
    for key, what in (("Seed", "seed"), ("CFG scale", "CFG scale")):
        if key not in entries:
            draft.note(f"its {what} is not given; using the default")
    _choose_noise(entries, draft)
    _choose_timesteps(entries, draft)
    if hires:
        draft.values |= {"upscale": job.upscale, "upscale_in": job.upscale_in}
        draft.number("upscale_strength", job.strength if "Denoising strength" in known else None)
    else:
        choose_start(entries, job.strength, draft)
    padding = entries.pop("Masked area padding", "")
    if entries.pop("Inpaint area", "").lower() == "only masked":
        draft.crop_to_mask(_whole(padding) if padding.isdecimal() and len(padding) < 5 else _USUAL_PADDING)
    draft.model, draft.model_hash = entries.get("Model", ""), entries.get("Model hash", "")
    find_files(entries, draft)
    read_controls(entries, draft)
    if strength := positive(entries.get("Variation seed strength", "")):
        draft.values |= {
            "variation_seed": _whole(entries.pop("Variation seed", "")),
            "variation_strength": strength,
        }
        del entries["Variation seed strength"]
    if entries.pop("Tiling", "").lower() == "true":
        draft.values["seamless"] = "both"
    _leave_out(entries, draft)
    return draft.finish()


def _choose_size(entries: Mapping[str, str], origin: Origin, upscale: float, draft: Draft) -> None:
    """Uses the image's size, before the second pass, if the text does not give one."""
    if "Size-1" in entries and "Size-2" in entries:
        return
    if origin.size is None:
        draft.note("its size is not given; using the default")
        return
    width, height = (max(8, int(side / upscale) // 8 * 8) for side in origin.size)
    draft.values |= {"width": width, "height": height}
    draft.note(f"its size is not given; using the image's own, {width}x{height}")


def _choose_step_settings(job: Job, draft: Draft) -> None:
    """Sets what the noise of the steps is, as far as the sampler adds some."""
    row = SOLVERS[draft.values["sampler"]]
    draft.values |= {name: getattr(job, name) for name in ("s_noise", "s_churn") if name in row.settings}
    if row.draws or draft.values.get("eta"):
        draft.values["step_seed_delta"] = job.step_seed_delta


# --- noise and timesteps -------------------------------------------------------------------------------------------


def _choose_noise(entries: dict[str, str], draft: Draft) -> None:
    """Chooses a generator per image, on the GPU unless stated otherwise; any GPU is assumed to be NVIDIA's."""
    rng = entries.get("RNG", "")
    if rng == "CPU" or (not rng and draft.source in _ON_THE_CPU):
        draft.cpu_noise()
    elif rng not in ("", "GPU", "NV"):
        draft.note(f"noise generator {rng[:50]} is not supported; using an NVIDIA card's")
    elif rng != "NV":
        draft.gpu_noise()


def _choose_timesteps(entries: dict[str, str], draft: Draft) -> None:
    if draft.source in ("A1111", "SD.Next") and entries.get("Sampler", "").upper() in ("DDIM", "PLMS"):
        draft.spacing_of_compvis()
        if draft.source == "A1111" and _version(entries) >= (1, 6):
            draft.note(
                "since version 1.6 the web UI leaves out the last step of DDIM and PLMS; here it is run"
            )


def _program(entries: dict[str, str], source: str) -> Program:
    """Returns how the names of samplers and schedules are meant."""
    if source in (CPP.name, "Draw Things"):
        return CPP
    if source in _ON_THE_CPU:
        return COMFYUI
    return WEB_UI if "Schedule type" in entries else OLD_WEB_UI


def _version(entries: dict[str, str]) -> tuple[int, ...]:
    """Returns the web UI's version, from v1.10.1 or v1.10.1-12-gabcdef; forks' and unknown ones count as 1.6."""
    parts = entries.get("Version", "").removeprefix("v").partition("-")[0].split(".")
    return tuple(map(int, parts)) if all(part.isdecimal() and len(part) < 5 for part in parts) else (1, 6)


def _whole(text: str) -> int:
    return int(text) if text.isdecimal() and len(text) < 21 else 0


def _leave_out(entries: Mapping[str, str], draft: Draft) -> None:
    """Notes settings without a counterpart here."""
    hashes = {*listed_hashes(entries, "Lora hashes"), *listed_hashes(entries, "TI hashes")}
    harmless = {
        *HARMLESS,
        ("Hires steps", entries.get("Steps", "")),
        ("Hires sampler", entries.get("Sampler", "")),
        *((f"Hires CFG {scale}", entries.get("CFG scale", "")) for scale in ("scale", "Scale")),
    }
    for key in sorted(entries.keys() - FOREIGN_KEYS - SILENT - hashes):
        name, value = key, entries[key]
        if key.endswith("-1"):
            name, value = key[:-2], f"{value}x{entries.get(f'{key[:-2]}-2', '')}"
        if name in SILENT or (key.endswith("-2") and f"{key[:-2]}-1" in entries):
            continue
        if key in ("VAE", "Eta") or name in ("First pass size", "Hires resize", "Hires fixed"):
            continue
        if key.startswith("AddNet ") or (key == "Hires upscaler" and not draft.values.get("upscale")):
            continue
        if key == "Variation seed" and positive(entries.get("Variation seed strength", "")) == 0:
            continue
        if (key, value) not in harmless and value.lower() not in NOTHING:
            draft.leave_out(name, value)


# --- other programs' names -----------------------------------------------------------------------------------------


def _as_web_ui(entries: dict[str, str]) -> dict[str, str]:
    """Returns the entries of forks and older versions of the web UI under its present names."""
    entries = dict(entries)
    if "Hires upscale" not in entries and "Hires scale" in entries:
        entries["Hires upscale"] = entries.pop("Hires scale")
    if "Eta DDIM" not in entries and _is_eta(entries.get("Eta", "")):
        entries["Eta DDIM"] = entries["Eta"]
    return entries


def _draw_things_as_web_ui(entries: dict[str, str]) -> dict[str, str]:
    """Returns the entries of Draw Things' description, whose negative prompt is a line that begins with a dash."""
    prompt, _, negative = f"\n{entries['Prompt']}".rpartition("\n-")
    own = {"Prompt": prompt.strip(), "Negative prompt": negative} if prompt else {}
    mode = entries["Seed Mode"].lower()
    rng = "CPU" if "torch cpu" in mode else "NV" if "nvidia" in mode else entries["Seed Mode"]
    return _as_web_ui(entries | own | {"RNG": rng})


def _is_eta(text: str) -> bool:
    return positive(text) > 0 or text in ("0", "0.0")


def _cpp_as_web_ui(entries: dict[str, str]) -> dict[str, str]:
    """Returns the entries under the web UI's names; one without a counterpart is kept, and noted later."""
    entries = dict(entries)
    sampler, _, schedule = entries.get("Sampler", "").partition(" ")
    entries |= {"Sampler": sampler, "Schedule type": schedule or "Automatic"}
    entries["RNG"] = _CPP_NOISE.get(entries.get("RNG", "cuda"), entries.get("RNG", ""))
    upscaler = entries.pop("Hires upscale", "")
    if "Hires scale" in entries:
        entries |= {"Hires upscaler": upscaler, "Hires upscale": entries.pop("Hires scale")}
    if positive(eta := entries.get("Eta", "0")):
        entries["Eta DDIM"] = eta
    return entries
