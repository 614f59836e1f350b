"""Reads programs that write a flat table of settings: as JSON, as separate PNG chunks, or into XMP."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from ldm.images.keywords import INFOTEXT_KEYWORD
from ldm.json_value import Json, JsonObject, as_list, as_object, as_text, load_object, objects_of
from ldm.metadata.foreign.samplers import COMFYUI, OTHER, choose_sampler
from ldm.metadata.infotext import file_name
from ldm.metadata.recipe import Draft, Origin, Recipe
from ldm.util import InputError

# The entries of a file in one table, whose names are in lower case with letters and digits only, is a `JsonObject`.
_OBJECTS = ("Comment", INFOTEXT_KEYWORD, "parameters-json", "generation_data")  # texts that may be JSON
_NAMES = {
    "prompt": ("fullprompt", "positiveprompt", "includeinimage", "prompt", "c", "textprompts", "description"),
    "negative_prompt": (
        *("fullnegativeprompt", "negativeprompt", "excludefromimage"),
        *("uc", "negative", "negativeprompts"),
    ),
    "seed": ("seed",),
    "steps": ("steps", "numinferencesteps"),
    "scale": ("cfgscale", "guidancescale", "cfg", "scale"),
    "width": ("width",),
    "height": ("height",),
}
_SAMPLERS = ("comfyuisampler", "autowebuisampler", "samplername", "sampler")
_SIZES = ("size", "resolution")
_MODELS = (
    "model", "basemodel", "basemodelname", "usestablediffusionmodel", "stablediffusionmodel", "modelname", "ckpt",
)  # fmt: skip
_HASHES = ("basemodelhash", "modelhash")
_NOT_HERE = {
    "vae": "VAE", "usevaemodel": "VAE", "vaemodel": "VAE", "refinermodel": "refiner",
    "refinermodelname": "refiner", "usefacecorrection": "face correction", "useupscale": "upscaling",
    "useupscaling": "upscaling", "tiling": "tiling", "seamlesstiling": "tiling", "usecontrolnetmodel": "ControlNet",
    "controlnetmodel": "ControlNet", "usehypernetworkmodel": "hypernetwork", "hypernetworkmodel": "hypernetwork",
    "useembeddingsmodel": "embeddings", "embeddingmodels": "embeddings", "freeu": "FreeU", "variationseed":
    "variation seed", "refinerupscale": "upscaling", "upscaler": "upscaler", "controls": "controls", "sharpness":
    "sharpness", "adaptivecfg": "adaptive CFG", "v4prompt": "character prompts",
    "denoisingstrength": "a strength, which counts only with an image to start from:",
    "perhapsstrength": "a strength, which counts only with an image to start from:",
}  # fmt: skip
_NONE = ("", "none", "false", "default", "automatic", "0")
_SIZE = re.compile(r"\(?\s*([0-9]{1,5})\s*[x×*,]\s*([0-9]{1,5})\s*\)?")
_NUMBER = r"[+-]?[0-9]*\.?[0-9]+"


class _Program(NamedTuple):
    """A program: its name, how its table is recognised, its noise source, and its syntax of prompt weights."""

    name: str
    is_its: Callable[[JsonObject], bool]
    on_the_cpu: bool = False
    is_read: bool = True


def _software(name: str) -> Callable[[JsonObject], bool]:
    return lambda content: str(content.get("software", "")).lower().startswith(name)


def _has(*names: str) -> Callable[[JsonObject], bool]:
    return lambda content: content.keys() >= set(names)


def _is_novelai(content: JsonObject) -> bool:
    return _software("novelai")(content) or _has("uc", "noiseschedule")(content)


def _is_easy_diffusion(content: JsonObject) -> bool:
    return "usestablediffusionmodel" in content or "stablediffusionmodel" in content


def _is_fooocus(content: JsonObject) -> bool:
    return "basemodel" in content and ("performance" in content or "sharpness" in content)


def _is_midjourney(content: JsonObject) -> bool:
    return "Job ID:" in str(content.get("description", ""))


_PROGRAMS = (
    _Program("SwarmUI", _has("suiimageparams"), on_the_cpu=True),
    _Program("RuinedFooocus", _software("ruinedfooocus"), on_the_cpu=True),
    _Program("TensorArt", _has("generationdata"), on_the_cpu=True),
    _Program("Stability Matrix", _has("parametersjson"), on_the_cpu=True),
    _Program("NovelAI", _is_novelai),
    _Program("Draw Things", _has("c", "uc", "sampler")),
    _Program("Easy Diffusion", _is_easy_diffusion),
    _Program("Fooocus", _is_fooocus, on_the_cpu=True),
    _Program("Mochi Diffusion", _has("includeinimage")),
    _Program("Sygil", _has("prompt", "normalizepromptweights")),
    _Program("NMKD", _has("nmkdiffusion"), is_read=False),
    _Program("Artroom", _has("textprompts", "cfgscale")),
    _Program("imaginAIry", _software("imaginairy"), is_read=False),
    _Program("Midjourney", _is_midjourney, is_read=False),
    _Program("diffusers", _has("prompt", "numinferencesteps", "guidancescale")),
    _Program("sd-scripts of kohya", _has("prompt", "seed", "sampler", "steps", "scale")),
)


def read(texts: Mapping[str, str], origin: Origin) -> Recipe | None:
    """Reads the recipe of an image from a table of settings among its texts; None if no table is recognised.

    Raises InputError, with the program's name, for a program whose tables are not supported.
    """
    content = _content(texts)
    program = next((program for program in _PROGRAMS if program.is_its(content)), None)
    if program is None:
        return None
    if not program.is_read:
        raise InputError(f"it was made with {program.name}, whose settings are not supported")
    if not _found(content, ("seed",)) and not _found(content, _NAMES["steps"]):
        raise InputError(f"it was made with {program.name}, but holds neither a seed nor steps")
    draft = Draft(program.name)
    for name in ("prompt", "negative_prompt"):
        draft.values[name] = _prompt(_found(content, _NAMES[name]))
    if program.name == "Sygil":
        prompt, _, negative = draft.values["prompt"].partition("###")
        draft.values |= {"prompt": prompt.strip(), "negative_prompt": negative.strip()}
    _choose_numbers(content, origin, draft)
    if program.name == "Mochi Diffusion":
        content["sampler"] = content.pop("scheduler", "")
    schedule = as_text(_found(content, ("comfyuischeduler", "scheduler", "noiseschedule")))
    names = COMFYUI if program.on_the_cpu else OTHER
    own = schedule.lower() in (*_NONE, "normal", "ddim_uniform", "native")
    choose_sampler(draft, as_text(_found(content, _SAMPLERS)), "" if own else schedule, names)
    _choose_noise(content, program, draft)
    _choose_start(content, program, draft)
    model = _found(content, _MODELS)
    of_model = (
        _folded(model) if isinstance(model, dict) else {"name": model, "hash": _found(content, _HASHES)}
    )
    draft.model = file_name(as_text(_found(of_model, ("modelfilename", "name"))))
    draft.model_hash = as_text(of_model.get("hash"))
    hashes: dict[str, str] = {}
    for lora, weight, digest in _loras(content):
        draft.lora(lora, weight, weight)
        hashes[draft.loras[-1][0]] = digest
    draft.hashes(hashes, {})
    skip = str(content.get("clipskip", ""))
    if skip.lower() not in (*_NONE, "-1"):
        draft.whole("clip_skip", int(skip) if skip.isdecimal() and len(skip) < 4 else skip)
    for key, label in _NOT_HERE.items():
        value = content.get(key)
        if str(value).lower() not in _NONE:
            draft.leave_out(label, value)
    if program.name == "NovelAI":
        draft.values["clip_skip"] = 2
        if any(re.search(r"[{}\[\]]|::", draft.values[name]) for name in ("prompt", "negative_prompt")):
            draft.note("signs in its prompts are weights to NovelAI")
    return draft.finish()


def _content(texts: Mapping[str, str]) -> JsonObject:
    """Returns the texts, and the entries of those that are JSON, in one table."""
    content = _folded({name.removeprefix("SD:"): text for name, text in texts.items()})  # Sygil's prefix
    for keyword in _OBJECTS:
        found = load_object(texts.get(keyword, ""))
        for inner in ("sui_image_params", "meta", "reqBody"):
            found |= as_object(found.get(inner))
        content |= _folded(found)
    return content


def _folded(table: Mapping[str, Json]) -> JsonObject:
    return {re.sub("[^a-z0-9]", "", str(name).lower()): value for name, value in table.items()}


def _found(content: JsonObject, names: tuple[str, ...]) -> Json:
    """Returns the first of these entries that is set."""
    return next((content[name] for name in names if content.get(name) not in (None, "", [], {})), None)


def _prompt(value: Json) -> str:
    """Returns a prompt, joined if it is a list of parts."""
    if isinstance(value, list):
        return ", ".join(part for part in value if isinstance(part, str))
    return as_text(value)


def _number(value: Json) -> Json:
    """Converts a number in quotes; any other value is returned unchanged."""
    if not isinstance(value, str) or not re.fullmatch(f"{_NUMBER}(?:e[+-]?[0-9]+)?", value.strip()):
        return value
    return int(value) if re.fullmatch("-?[0-9]{1,20}", value.strip()) else float(value)


def _choose_numbers(content: JsonObject, origin: Origin, draft: Draft) -> None:
    found = {name: _number(_found(content, names)) for name, names in _NAMES.items()}
    size = _SIZE.fullmatch(as_text(_found(content, _SIZES)))
    if size and not (found["width"] and found["height"]):
        found |= {"width": int(size[1]), "height": int(size[2])}
    if not (found["width"] and found["height"]) and origin.size is not None:
        width, height = (max(8, side // 8 * 8) for side in origin.size)
        found |= {"width": width, "height": height}
        draft.note(f"its size is not given; using the image's own, {width}x{height}")
    seed = found["seed"]
    if type(seed) is int and seed < 0:
        draft.note(f"a random seed was asked for ({seed}); using 42")
        found["seed"] = 42
    for name in ("seed", "steps", "width", "height"):
        value = found[name]
        draft.whole(name, int(value) if isinstance(value, float) and value.is_integer() else value)
    draft.number("scale", found["scale"])


def _choose_noise(content: JsonObject, program: _Program, draft: Draft) -> None:
    mode = str(content.get("seedmode") or as_object(content.get("v2")).get("seedMode", "")).lower()
    of_web_ui = (
        program.name == "SwarmUI" and "autowebuisampler" in content and "comfyuisampler" not in content
    )
    if (program.on_the_cpu and not of_web_ui) or "torch cpu" in mode or mode == "1":
        draft.cpu_noise()
    elif program.name in ("Draw Things", "Mochi Diffusion") and "nvidia" not in mode and mode != "3":
        draft.note("its noise generator is not supported; using an NVIDIA card's")
    else:
        draft.gpu_noise()


def _choose_start(content: JsonObject, program: _Program, draft: Draft) -> None:
    """Adds a start image, by the entries of each program."""
    strength = _number(_found(content, ("promptstrength", "initimagecreativity", "strength")))
    image = file_name(as_text(_found(content, ("initimage", "initimagefilename"))))
    kind = as_text(content.get("requesttype")).lower()
    if program.name == "NovelAI" and "img2img" not in kind and "infill" not in kind:
        return  # a strength is written for text to image, too
    if (isinstance(strength, (int, float)) and strength < 1) or (image and len(image) < 256):
        draft.start_from(image if len(image) < 256 else "", 0.75 if strength is None else strength)


def _loras(content: JsonObject) -> Iterator[tuple[str, Json, str]]:
    """Reads LoRAs in each program's notation: name, weight, hash."""
    listed = _found(content, ("loras", "uselorasmodel", "useloramodel", "loramodel", "lora"))
    listed = listed or as_object(content.get("v2")).get("loras")
    weights = _found(content, ("loraweights", "loraalpha", "lorastrength"))
    if isinstance(listed, str):
        pairs = re.finditer(rf"<([^<>:]+):({_NUMBER})>", listed)
        entries: list[Json] = [[pair[1], pair[2]] for pair in pairs] or [listed]
    else:
        entries = as_list(listed)
    entries = entries[:20]
    models = objects_of(as_list(content.get("models"))[:20])
    entries += [entry for entry in models if entry.get("type") == "LORA"]
    for i, entry in enumerate(entries):
        weight = weights[i] if isinstance(weights, list) and i < len(weights) else weights
        found = _lora(entry, 1.0 if weight is None or isinstance(weight, list) else weight)
        if found is not None and found[0].lower() not in _NONE:
            yield found
    for key, value in sorted(content.items()):
        is_one = key.startswith("loracombined")
        combined = re.fullmatch(rf"(.+) : ({_NUMBER})", as_text(value)) if is_one else None
        if combined and not entries and combined[1] != "None":
            yield combined[1], float(combined[2]), ""


def _lora(entry: Json, weight: Json) -> tuple[str, Json, str] | None:
    if isinstance(entry, str):
        return entry, _number(weight), ""
    if isinstance(entry, dict):
        name = as_text(_found(_folded(entry), ("file", "modelfilename", "model", "name", "label")))
        return name, _number(entry.get("weight", weight)), as_text(entry.get("hash"))
    if not isinstance(entry, list) or len(entry) < 2 or not isinstance(entry[0], str):
        return None
    if packed := re.fullmatch(rf"({_NUMBER}) - (.+)", str(entry[1])):  # a hash, then weight and name
        return packed[2], float(packed[1]), entry[0]
    return entry[0], _number(entry[1]), as_text(entry[2]) if len(entry) > 2 else ""
