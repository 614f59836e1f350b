"""The infotext: of this toolkit, of AUTOMATIC1111's web UI and its forks, and of programs that write it as well.

The web UI and stable-diffusion.cpp read weights, BREAK and more than 75 tokens in every prompt, so their jobs have
the syntax "a1111" always: a prompt without any of it gives the same conditioning bit for bit in either syntax, and
whether it has more tokens than 75 only a model's tokenizer can say.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from ldm.images.foreign.own import recipe
from ldm.images.foreign.recipe import UNKNOWN, Draft, Origin, Recipe
from ldm.images.metadata import JOB_KEYS, NEGATIVE, file_name, job_from_entries, parse_infotext
from ldm.util import InputError, printable

_CPP = "stable-diffusion.cpp"
_CPP_NOISE = {"cuda": "NV", "cpu": "CPU"}
_ON_THE_CPU = ("ComfyUI", "Fooocus")  # programs that draw noise there, as their `Version` begins

# entries that change nothing, or that are read; every other one that the job has no field for is noted
_SILENT = {
    "Version", "User", "Model", "Model hash", "Schedule type", "Lora hashes", "TI hashes", "Hashes", "Lora weights",
    "Embeddings", "Used embeddings", "Guidance", "Batch size", "Batch pos", "Batch", "Index", "App", "Operations",
    "Pipeline", "Backend", "SDCPP", "Civitai resources", "Civitai metadata", "Hires size-1", "Hires size-2",
    "Second pass", "Refine", "Init image size-1", "Init image size-2", "Created Date", "Time taken", "VAE hash",
    "Raw prompt", "Raw negative prompt", "Performance", "Template", "Negative Template",
}  # fmt: skip
_HARMLESS = {
    ("Clip skip", "1"), ("ENSD", "0"), ("Emphasis", "Original"), ("Emphasis", "None"), ("Parser", "A1111"),
    ("Variation seed strength", "0"), ("FP8 weight", "Disable"), ("VAE Encoder", "Full"), ("VAE Decoder", "Full"),
    ("Mask mode", "Inpaint masked"), ("Schedule max sigma", "0"), ("Schedule min sigma", "0"), ("Schedule rho", "0"),
    ("Diffusion in Low Bits", "Automatic"), ("Clip skip", "0"), ("Clip skip", "-1"),
}  # fmt: skip
_NOTHING = {"", "none", "false", "automatic", "use same sampler", "use same scheduler", "use same checkpoint",
            "use same choices", "0x0", "-1x-1"}  # fmt: skip
_FOREIGN_KEYS = JOB_KEYS & {
    "Prompt", "Negative prompt", "Steps", "Sampler", "CFG scale", "Seed", "Size-1", "Size-2", "Eta DDIM", "RNG",
    "Denoising strength", "Hires upscale", "Hires upscaler", "Loras",
}  # fmt: skip

# What an entry is called here, by its name in lower case without anything but letters and digits
_SPELLINGS = {re.sub("[^a-z0-9]", "", name.lower()): name for name in (
    *_SILENT, *_FOREIGN_KEYS, *(name for name, _ in _HARMLESS), "Size", "Eta", "VAE", "Hires resize", "Hires fixed",
    "Hires scale", "Hires steps", "Hires strength", "Hires size", "Hires force", "First pass size", "Init image hash",
    "Init image size", "Mask blur", "Masked content", "Inpaint area", "Masked area padding", "Mask weight",
    "Image CFG scale", "Variation seed",
) if not name.endswith(("-1", "-2"))} | {
    "cfg": "CFG scale", "guidancescale": "CFG scale", "samplingsteps": "Steps", "numinferencesteps": "Steps",
    "samplername": "Sampler", "samplingmethod": "Sampler", "scheduler": "Schedule type", "width": "Size-1",
    "height": "Size-2", "denoise": "Denoising strength", "denoisingstrength": "Denoising strength",
    "checkpoint": "Model", "hiresfactor": "Hires upscale", "hiresdenoisingstrength": "Hires strength",
    "etanoiseseeddelta": "ENSD", "samplerensd": "ENSD", "samplseretadelta": "ENSD", "variationstrength":
    "Variation seed strength",
}  # fmt: skip
_SIZE = re.compile(r"\(?\s*([0-9]{1,5})\s*[x×*,]\s*([0-9]{1,5})\s*\)?")
_NEGATIVE_FIRST = re.compile(r"(?im)^[^\S\n]*negative[ _]prompt:[^\S\n]*")
_NEGATIVE_WITHIN = re.compile(r"(?i)[\s,.]negative[ _]prompt:\s*")
_NEGATIVE_AFTER_STOP = re.compile(r"(?i)[,.]\s?negative[ _]prompt:\s*")
_STEPS_FIRST = re.compile(r"(?im)^[^\S\n]*(?:\w[\w ]{1,20}:[^\n:]*[,|][^\S\n]*)*(?:sampling )?steps:")
_STEPS_WITHIN = re.compile(r"(?i)[\s,.](?=steps: ?[0-9]+[,|])")
_SETTING = re.compile(r"\b(?:Seed|Sampler|CFG scale|Size|Model):", re.IGNORECASE)
_USED = re.compile(r"(?m)^(Used embeddings): ([^\"\n]+)$")  # a line of its own after the settings, unquoted
_SCHEDULES = ("Karras", "Exponential", "Polyexponential", "SGM Uniform", "Uniform")
_OWN_SCHEDULES = ("automatic", "uniform", "ddim", "ddim_uniform", "discrete", "")

# entries that only a job with an image to start from has; a denoising strength is not one of them
_OF_A_START = (
    "Init image hash", "Init image size-1", "Mask blur", "Mask mode", "Masked content", "Inpaint area",
    "Masked area padding", "Mask weight", "Resize mode", "Image CFG scale", "Noise multiplier",
)  # fmt: skip
_SCRIPTS_OF_A_START = ("Soft inpainting", "SD upscale", "Ultimate SD upscale", "Loopback")
_OF_A_MASK = ("Mask blur", "Mask mode", "Masked content", "Inpaint area", "Mask weight")
_USUAL_STRENGTH, _USUAL_FACTOR = 0.75, 2.0  # of the web UI


def read(text: str, origin: Origin = UNKNOWN) -> Recipe:
    """The recipe of a picture with an infotext; its `Version` says whose it is."""
    if text.lstrip().startswith("{"):
        raise InputError("it is JSON of a program that is not supported")
    entries = parse_infotext(text)
    version = entries.get("Version", "")
    if version.startswith("ldm "):
        return recipe(job_from_entries(entries), {k: v for k, v in entries.items() if k not in JOB_KEYS}, [])
    entries = _named(parse_infotext(_tidy(text)))
    if version.startswith(_CPP):
        return _recipe(_cpp_as_web_ui(entries), _CPP, origin)
    programs = [name for name in _ON_THE_CPU if version.lower().startswith(name.lower())]
    source = programs[0] if programs else "SD.Next" if entries.get("App") == "SD.Next" else "A1111"
    return _recipe(_as_web_ui(entries), source, origin)


def _tidy(text: str) -> str:
    """`text` with its ends of line and spaces at them as the web UI reads it, and each part on lines of its own."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "").strip()
    within = None if _STEPS_FIRST.search(text) else _STEPS_WITHIN.search(text, text.rfind("\n") + 1)
    if within and not _SETTING.search(text, text.rfind("\n") + 1, within.start()):
        # some programs write all on one line, with or without a full stop between
        prompts = _NEGATIVE_WITHIN.split(text[: within.start()], maxsplit=1)
        text = "\n".join(
            [f"\n{NEGATIVE} ".join(part.rstrip(" ,.") for part in prompts), text[within.end() :]]
        )
    elif not _NEGATIVE_FIRST.search(text):
        prompt, *rest = _NEGATIVE_AFTER_STOP.split(text, maxsplit=1)
        text = f"\n{NEGATIVE} ".join([prompt.rstrip(",.") if rest else prompt, *rest])
    text = "\n".join(line.strip() for line in _NEGATIVE_FIRST.sub(f"{NEGATIVE} ", text).split("\n"))
    return _USED.sub(lambda used: f"{used[1]}: {json.dumps(used[2])}", text)


def _named(entries: Mapping[str, str]) -> dict[str, str]:
    """The entries under the web UI's names, whatever their case; a size is split into its sides."""
    named: dict[str, str] = {}
    for key, value in entries.items():
        name, side = (key[:-2], key[-2:]) if key.endswith(("-1", "-2")) else (key, "")
        name = _SPELLINGS.get(re.sub("[^a-z0-9]", "", name.lower()), name) + side
        if name == key or name not in entries:
            named[name] = value
    if size := _SIZE.fullmatch(named.get("Size", "")):
        del named["Size"]
        named |= {"Size-1": size[1], "Size-2": size[2]}
    for key in ("Seed", "Steps", "Size-1", "Size-2"):
        if re.fullmatch(r"-?[0-9]+\.0+", named.get(key, "")):
            named[key] = named[key].partition(".")[0]
    named["Prompt"] = named["Prompt"].strip()
    named["Negative prompt"] = re.sub(f"(?m)^{NEGATIVE} ?", "", named["Negative prompt"]).strip()
    return named


def _recipe(entries: dict[str, str], source: str, origin: Origin) -> Recipe:
    draft = Draft(source)
    if "Steps" not in entries and {"Seed", "Sampler"} & entries.keys():
        draft.note("steps is not given; using 50")
        entries["Steps"] = "50"
    hires = _hires(entries, origin, draft)
    known = {key: value for key, value in entries.items() if key in _FOREIGN_KEYS}
    if known.get("Seed", "").startswith("-"):
        draft.note(f"a random seed was asked for ({known.pop('Seed')}); using 42")
    job = job_from_entries(known)
    draft.values |= {
        name: getattr(job, name)
        for name in ("prompt", "negative_prompt", "seed", "width", "height", "steps", "scale", "eta")
    }
    _choose_size(entries, origin, job.upscale, draft)
    if source not in _ON_THE_CPU:
        # the emphasis None is the web UI's word for brackets that are text
        draft.values["prompt_syntax"] = "plain" if entries.get("Emphasis") == "None" else "a1111"
    draft.loras += job.loras
    draft.sampler(entries.get("Sampler", ""))
    if known.get("Eta DDIM") and draft.values["sampler"] == "ddim":
        draft.values["eta"] = job.eta
    for key in ("Seed", "CFG scale"):
        if key not in entries:
            draft.note(
                f"{key[:1].lower() if key == 'Seed' else key[:1]}{key[1:]} is not given; using the default"
            )
    _choose_noise(entries, draft)
    _choose_timesteps(entries, draft)
    if hires:
        draft.values |= {"upscale": job.upscale, "upscale_in": job.upscale_in}
        draft.number("upscale_strength", job.strength if "Denoising strength" in known else None)
    else:
        _choose_start(entries, job.strength, draft)
    draft.model, draft.model_hash = entries.get("Model", ""), entries.get("Model hash", "")
    _find_files(entries, draft)
    _leave_out(entries, draft)
    return draft.finish()


def _choose_size(entries: Mapping[str, str], origin: Origin, upscale: float, draft: Draft) -> None:
    """The image's own size, before the second pass, where the text does not give one."""
    if "Size-1" in entries and "Size-2" in entries:
        return
    if origin.size is None:
        draft.note("size is not given; using the default")
        return
    width, height = (max(8, int(side / upscale) // 8 * 8) for side in origin.size)
    draft.values |= {"width": width, "height": height}
    draft.note(f"size is not given; using the image's own, {width}x{height}")


# --- a second pass, or an image to start from ----------------------------------------------------------------------


def _hires(entries: dict[str, str], origin: Origin, draft: Draft) -> bool:
    """Whether there is a second pass; a size that it is brought to becomes a factor of the first pass's."""
    first = _sides(entries, "First pass size")  # versions before 2023
    resize = [_sides(entries, key) for key in ("Hires resize", "Hires fixed")]
    target = next((sides for sides in resize if any(sides)), (0, 0))
    upscaler = entries.get("Hires upscaler", "")
    marked = entries.pop("Hires upscale", "")
    factor = _positive(marked)
    if not factor and marked.lower() not in (*_NOTHING, "0", "0.0"):
        raise InputError(f"the text's entry Hires upscale cannot be {printable(marked[:100])!r}")
    is_old = "First pass size-1" in entries
    if not (
        is_old
        or factor
        or any(target)
        or upscaler.lower() not in _NOTHING
        or _positive(entries.get("Hires steps", ""))
    ):
        return False
    size = _size(entries, origin)
    if is_old:
        target, size = size, first if all(first) else _old_first_pass(*size)
        entries |= {"Size-1": str(size[0]), "Size-2": str(size[1])}
    if not factor and any(target) and all(size):
        factor = max(side / own for side, own in zip(target, size, strict=True))
        if all(target) and any(abs(own * factor - side) >= 8 for side, own in zip(target, size, strict=True)):
            draft.note(f"left out: cropping the second pass to {target[0]}x{target[1]}")
    if not factor:
        factor = (
            origin.size[0] / size[0]
            if origin.size and all(size) and origin.size[0] > size[0]
            else _USUAL_FACTOR
        )
        draft.note(f"the second pass's size is not given; using {factor:g} times the first")
    if "Hires strength" in entries:
        entries["Denoising strength"] = entries.pop("Hires strength")
    elif (
        entries.get("App") == "SD.Next"
        and "Denoising strength" not in entries
        and "Hires force" not in entries
    ):
        entries["Denoising strength"] = "0"  # SD.Next only enlarges, then
    if factor <= 1:
        draft.note(f"left out: a second pass at {factor:g} times the first one's size")
        entries.pop("Denoising strength", None)
        entries.pop("Hires upscaler", None)
        return False
    entries["Hires upscale"] = repr(factor)
    if upscaler.lower() not in ("", "none", "lanczos", "latent"):
        draft.note(
            f"upscaler {upscaler} is not supported; using {'bilinear' if 'Latent' in upscaler else 'Lanczos'}"
        )
    return True


def _sides(entries: Mapping[str, str], key: str) -> tuple[int, int]:
    """A size's width and height, 0 for what is not given."""
    sides = [entries.get(f"{key}-{side}", "0") for side in (1, 2)]
    width, height = (int(side) if re.fullmatch("[0-9]{1,5}", side) else 0 for side in sides)
    return width, height


def _size(entries: Mapping[str, str], origin: Origin) -> tuple[int, int]:
    size = _sides(entries, "Size")
    return size if all(size) or origin.size is None else origin.size


def _old_first_pass(width: int, height: int) -> tuple[int, int]:
    """The size that the web UI of 2022 chose by itself: about 512x512 pixels, in multiples of 64."""
    scale = math.sqrt(512 * 512 / max(1, width * height))
    return math.ceil(scale * width / 64) * 64, math.ceil(scale * height / 64) * 64


def _positive(text: str) -> float:
    """The number above 0 that a text is, else 0."""
    try:
        number = float(text)
    except ValueError:
        return 0.0
    return number if math.isfinite(number) and number > 0 else 0.0


def _choose_start(entries: Mapping[str, str], strength: float, draft: Draft) -> None:
    """An image to start from, where the text says so, or has a strength and nothing that speaks against it."""
    said = "Denoising strength" in entries
    operations = set(re.split(r"[;,\s]+", entries.get("Operations", "").lower())) - {"", "none"}
    marks = [key for key in entries if key in _OF_A_START or key.startswith(_SCRIPTS_OF_A_START)]
    if operations:
        if "txt2img" in operations or not operations & {"img2img", "inpaint"}:
            return
    elif not marks and not said:
        return
    elif not marks and strength == 0:
        draft.note(
            "a denoising strength of 0 is ignored; programs that use the web UI write it for text to image"
        )
        return
    if not said:
        draft.note(f"its denoising strength is not given; using {_USUAL_STRENGTH}")
        strength = _USUAL_STRENGTH
    draft.start_from("", strength)
    if not marks and not operations:
        draft.note("only its denoising strength says so; some programs write one for text to image as well")
    if "inpaint" in operations or any(key in entries for key in _OF_A_MASK):
        draft.note("it repaints where a mask is white, and the mask is not in the file; give it with --mask")


# --- noise and timesteps -------------------------------------------------------------------------------------------


def _choose_noise(entries: dict[str, str], draft: Draft) -> None:
    """A generator for each picture, on the GPU unless it is said; an NVIDIA card's noise is taken for any GPU's."""
    rng = entries.get("RNG", "")
    if rng == "CPU" or (not rng and draft.source in _ON_THE_CPU):
        draft.cpu_noise()
    elif rng not in ("", "GPU", "NV"):
        draft.note(f"noise generator {rng[:50]} is not supported; using an NVIDIA card's")
    elif rng != "NV":
        draft.note("its noise is taken to be an NVIDIA card's; another GPU's would differ")


def _choose_timesteps(entries: dict[str, str], draft: Draft) -> None:
    schedule = entries.get("Schedule type", "")
    if schedule.lower() not in _OWN_SCHEDULES:
        draft.note(f"schedule {schedule[:50]} is not supported; using the sampler's own")
    if draft.source in ("A1111", "SD.Next") and entries.get("Sampler", "").upper() in ("DDIM", "PLMS"):
        draft.spacing_of_compvis()
        if draft.source == "A1111" and _version(entries) >= (1, 6):
            draft.note(
                "since version 1.6 the web UI leaves out the last step of DDIM and PLMS; here it is run"
            )


def _version(entries: dict[str, str]) -> tuple[int, ...]:
    """The web UI's version, from v1.10.1 or v1.10.1-12-gabcdef; forks' and unknown ones count as new."""
    parts = entries.get("Version", "").removeprefix("v").partition("-")[0].split(".")
    return tuple(map(int, parts)) if all(part.isdecimal() and len(part) < 5 for part in parts) else (1, 6)


# --- files ---------------------------------------------------------------------------------------------------------


def _find_files(entries: Mapping[str, str], draft: Draft) -> None:
    """What the text says of LoRAs, textual inversions and the VAE: names, hashes, weights."""
    hashes = _object(entries.get("Hashes", ""))
    loras = _listed(entries, "Lora hashes") | {k[5:]: v for k, v in hashes.items() if k.startswith("lora:")}
    words = {name.strip(): "" for name in _names(entries)} | _listed(entries, "TI hashes")
    words |= {k[6:]: v for k, v in hashes.items() if k.startswith("embed:") and k[6:] not in words}
    draft.model_hash = draft.model_hash or hashes.get("model", "")
    asked = {file_name(name).lower() for name, *_ in draft.loras}
    weights = _listed(entries, "Lora weights")
    numbers = [part.strip() for part in entries.get("Lora weights", "").split(",")]
    if len(numbers) == len(loras) and all(map(_positive, numbers)):  # without names, as SwarmUI lists them
        weights = dict(zip(loras, numbers, strict=True))
    for name, weight in weights.items():
        if name.lower() not in asked:
            number = _number(weight)
            draft.lora(name, number, number)
            asked.add(name.lower())
    for name, weight, on_text, digest in _of_additional_networks(entries):
        draft.lora(name, weight, on_text)
        asked.add(name.lower())
        loras.setdefault(name, digest)
    for name in loras:
        if not asked & {name.lower(), re.sub("[:,]", "", name.lower())} and not any(
            f":{name.lower()}:" in draft.values[prompt].lower() for prompt in ("prompt", "negative_prompt")
        ):
            draft.note(f"left out: the LoRA {name}, whose weight is not given")
    for what in _of_civitai(entries, asked):
        draft.note(f"left out: {what}, which Civitai's list of resources names")
    draft.hashes(loras, words)
    vae = entries.get("VAE", "")
    if vae.lower() not in _NOTHING:
        draft.note(f"it was made with the VAE {vae[:100]}; give its file with --vae")


def _listed(entries: Mapping[str, str], key: str) -> dict[str, str]:
    """What a list `name: hash, name: hash` says; more of it may follow unquoted as entries of its own."""
    listed = {}
    for part in entries.get(key, "").replace('"', "").split(","):
        name, sign, digest = (
            part.strip().partition(": ") if part.count(": ") > 1 else part.strip().rpartition(":")
        )
        if sign and name.strip():
            listed[name.strip()] = digest.partition(":")[0].strip()
    following = list(entries.items())[list(entries).index(key) + 1 :] if listed else []
    for name, digest in following:
        if name in _SPELLINGS.values() or not re.fullmatch("[0-9a-fA-F]{8,64}", digest):
            break
        listed[name] = digest
    return listed


def _names(entries: Mapping[str, str]) -> list[str]:
    """The textual inversions that are listed by name alone, some with the web UI's old checksum."""
    listed = ", ".join(entries.get(key, "") for key in ("Embeddings", "Used embeddings"))
    return [re.sub(r"\s*\[[0-9a-f]*\]$", "", name) for name in listed.split(", ") if name.strip()]


def _of_additional_networks(entries: Mapping[str, str]) -> list[tuple[str, float, float, str]]:
    """LoRAs of the extension Additional Networks: name, weight on the U-Net and on the text encoder, hash."""
    found = []
    for i in range(1, 6):
        model = re.fullmatch(r"(.+?)(?:\(([0-9a-f]*)\))?", entries.get(f"AddNet Model {i}", ""))
        if model and entries.get(f"AddNet Module {i}", "LoRA") == "LoRA":
            weight = entries.get(f"AddNet Weight A {i}", entries.get(f"AddNet Weight {i}", "1"))
            on_text = entries.get(f"AddNet Weight B {i}", weight)
            found.append((model[1], _number(weight), _number(on_text), model[2] or ""))
    return found


def _of_civitai(entries: Mapping[str, str], asked: set[str]) -> list[str]:
    """What Civitai's list of resources names besides checkpoints and the LoRAs that the prompt asks for."""
    try:
        listed: Any = json.loads(entries.get("Civitai resources", "[]"))
    except (ValueError, RecursionError):
        return ["what cannot be read"]
    found = []
    for entry in listed if isinstance(listed, list) else []:
        if not isinstance(entry, dict):
            continue
        kind, weight = str(entry.get("type", "")).lower(), entry.get("weight")
        name = str(entry.get("modelName") or f"version {entry.get('modelVersionId')}")
        if kind not in ("checkpoint", "model", "vae", "") and name.lower() not in asked:
            shown = next((word for word in ("lora", "locon", "embed", "hypernet") if word in kind), kind)
            found.append(f"{shown} {name}{'' if weight is None else f' at {weight}'}"[:150])
    return found


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 1.0


def _object(text: str) -> dict[str, str]:
    try:
        content: Any = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    items = content.items() if isinstance(content, dict) else ()
    return {str(key): value for key, value in items if isinstance(value, str)}


def _leave_out(entries: Mapping[str, str], draft: Draft) -> None:
    """Notes what has no counterpart here."""
    steady = draft.values.get("eta", 0) == 0 and draft.values["sampler"] in ("ddim", "plms")
    hashes = {*_listed(entries, "Lora hashes"), *_listed(entries, "TI hashes")}
    harmless = {
        *_HARMLESS,
        ("Hires steps", entries.get("Steps", "")),
        ("Hires CFG Scale", entries.get("CFG scale", "")),
    }
    for key in sorted(entries.keys() - _FOREIGN_KEYS - _SILENT - hashes):
        name, value = key, entries[key]
        if key.endswith("-1"):
            name, value = key[:-2], f"{value}x{entries.get(f'{key[:-2]}-2', '')}"
        if key.endswith("-2") and f"{key[:-2]}-1" in entries:
            continue
        if (
            (key == "ENSD" and steady)
            or key in ("VAE", "Eta")
            or name in ("First pass size", "Hires resize", "Hires fixed")
        ):
            continue
        if key.startswith("AddNet ") or (key == "Hires upscaler" and not draft.values.get("upscale")):
            continue
        if key == "Variation seed" and _positive(entries.get("Variation seed strength", "")) == 0:
            continue
        if (key, value) not in harmless and value.lower() not in _NOTHING:
            draft.leave_out(name, value)


# --- other programs' names -----------------------------------------------------------------------------------------


def _as_web_ui(entries: dict[str, str]) -> dict[str, str]:
    """The entries of the web UI's forks and older versions, as the web UI now writes them."""
    entries = dict(entries)
    if "Hires upscale" not in entries and "Hires scale" in entries:
        entries["Hires upscale"] = entries.pop("Hires scale")
    sampler = entries.get("Sampler", "")
    for schedule in _SCHEDULES:
        if sampler.lower().endswith(f" {schedule.lower()}") and "Schedule type" not in entries:
            entries |= {"Sampler": sampler[: -len(schedule) - 1], "Schedule type": schedule}
            break
    if "Eta DDIM" not in entries and _is_eta(entries.get("Eta", "")):
        entries["Eta DDIM"] = entries["Eta"]
    return entries


def _is_eta(text: str) -> bool:
    return _positive(text) > 0 or text in ("0", "0.0")


def _cpp_as_web_ui(entries: dict[str, str]) -> dict[str, str]:
    """The entries under the web UI's names; one that has no counterpart stays, and is noted later."""
    entries = dict(entries)
    sampler, _, schedule = entries.get("Sampler", "").partition(" ")
    entries |= {"Sampler": sampler, "Schedule type": schedule or "Automatic"}
    entries["RNG"] = _CPP_NOISE.get(entries.get("RNG", "cuda"), entries.get("RNG", ""))
    upscaler = entries.pop("Hires upscale", "")
    if "Hires scale" in entries:
        entries |= {"Hires upscaler": upscaler, "Hires upscale": entries.pop("Hires scale")}
    if _positive(eta := entries.get("Eta", "0")):
        entries["Eta DDIM"] = eta
    return entries
