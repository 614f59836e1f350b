"""Reads InvokeAI's metadata: JSON since version 3, and the command line and JSON of earlier versions."""

from __future__ import annotations

import itertools
import re

from ldm.json_value import JsonObject, as_list, as_object, as_text, load_json, objects_of
from ldm.metadata.foreign.samplers import choose_sampler
from ldm.metadata.infotext import file_name
from ldm.metadata.recipe import UNKNOWN, Draft, Origin, Recipe
from ldm.util import InputError

_UNWANTED = re.compile(r"\[([^\[\]]*)\]")  # the negative prompt of version 2 is part of the prompt
_CLOSING = re.compile(r'(?<!\\)"(?=\s*$|\s+--?[A-Za-z])')
_FIRST_OPTION = re.compile(r"(?:^|\s)-s ?[0-9]{1,6}(?=\s|$)")  # every version wrote the steps first
_ANY_OPTION = re.compile(r"(?:^|\s)--?[A-Za-z]")
_WEIGHTED = re.compile(r"\S:-?[0-9.]+(?=\s|$)")  # versions 1.x: a cat:1 a dog:2
_EMBEDDING = re.compile(r"<([\w.-][\w .-]{0,100})>")
_MODES = ("txt2img", "img2img", "inpaint", "outpaint")
_DREAM_NUMBERS = {"s": "steps", "S": "seed", "W": "width", "H": "height", "C": "cfg_scale", "f": "strength"}
_TWO_LETTERS = ("ft", "cf", "tm")
_LONG = {
    "-steps": "s", "-seed": "S", "-width": "W", "-height": "H", "-cfg_scale": "C", "-strength": "f", "-sampler": "A",
    "-init_img": "I", "-init_mask": "M",
}  # fmt: skip
_NOT_HERE = (
    "seamless", "seamless_x", "seamless_y", "vae", "controlnets", "ipAdapters",
    "t2iAdapters", "hrf_enabled", "refiner_model", "variations", "threshold", "perlin", "facetool", "upscale",
    "postprocessing", "hires_fix", "regions", "ref_images", "control_layers", "positive_style_prompt",
    "negative_style_prompt", "hrf_strength", "facetool_strength",
)  # fmt: skip
_ON_CANVAS = ("controlLayers", "regionalGuidance", "referenceImages")  # guidance in version 5


def read_metadata(text: str, _: Origin = UNKNOWN) -> Recipe:
    """Reads the recipe of an image of version 3 or later."""
    content = _object(text)
    draft = Draft("InvokeAI")
    draft.values["prompt"] = as_text(content.get("positive_prompt"))
    draft.values["negative_prompt"] = as_text(content.get("negative_prompt"))
    _settings(content, as_text(content.get("scheduler")), draft)
    model = as_object(content.get("model"))
    if (base := as_text(model.get("base") or model.get("base_model"))) not in ("", "sd-1"):
        draft.note(f"its model is of the kind {base[:50]}, not Stable Diffusion v1")
    draft.model = file_name(as_text(model.get("name") or model.get("model_name")))
    draft.model_hash = as_text(model.get("hash") or model.get("model_hash"))
    for lora in objects_of(as_list(content.get("loras"))[:20]):
        names = as_object(lora.get("model") or lora.get("lora"))
        draft.lora(names.get("name") or names.get("model_name"), lora.get("weight"), lora.get("weight"))
    if content.get("rand_device", "cpu") == "cpu":
        draft.cpu_noise()
    return draft.finish()


def read_sd_metadata(text: str, _: Origin = UNKNOWN) -> Recipe:
    """Reads the recipe of an image of version 1.15 to 2.3 from its JSON."""
    content = _object(text)
    image = content.get("image") or next(iter(as_list(content.get("images"))), None)
    if not isinstance(image, dict):
        raise InputError("it describes no image")
    draft = Draft("InvokeAI")
    prompt = image.get("prompt")
    if isinstance(prompt, list):
        parts = list(objects_of(prompt))
        prompt = " ".join(as_text(part.get("prompt")) for part in parts)
        if len(parts) > 1:
            draft.note("its prompt has weighted parts, which are joined here")
    _split_prompt(as_text(prompt), draft)
    _settings(image, as_text(image.get("sampler")), draft)
    draft.model = file_name(
        as_text(content.get("model_weights") or content.get("model_id") or content.get("model"))
    )
    draft.model_hash = as_text(content.get("model_hash"))
    draft.gpu_noise()
    return draft.finish()


def read_dream(text: str, _: Origin = UNKNOWN) -> Recipe:
    """Reads the recipe of an image of version 1 or 2 from the command that made it."""
    prompt, options = _split_command(text)
    content: JsonObject = {}
    draft = Draft("InvokeAI")
    for letter, value in _options(options):
        if letter in _DREAM_NUMBERS:
            content[_DREAM_NUMBERS[letter]] = _number(value)
        elif letter in ("A", "I", "M"):
            content[letter] = value
        elif letter not in ("n", "g", "o", "F", "-fit", "-grid"):  # how many, a grid, a folder, a fit
            draft.note(f"left out: option -{letter} {value}".rstrip())
    if "steps" not in content and "seed" not in content:
        raise InputError("its command has neither steps nor seed")
    _split_prompt(prompt.strip(), draft)
    content |= {"init_image": content.get("I", ""), "type": "inpaint" if content.get("M") else ""}
    _settings(content, as_text(content.get("A", "k_lms")), draft)
    draft.gpu_noise()
    return draft.finish()


def _options(text: str) -> list[tuple[str, str]]:
    """Returns options and their values, long names by their letters; the space after a letter may be missing."""
    found: list[tuple[str, str]] = []
    words = text.split()[:200]
    for i, word in enumerate(words):
        value = " ".join(itertools.takewhile(lambda w: not re.match("-[A-Za-z-]", w), words[i + 1 :]))
        name, _, joined = word[1:].partition("=")
        if name in _TWO_LETTERS or word.startswith("--"):
            found.append((_LONG.get(name, name), (joined or value).strip("\"'")))
        elif re.match("-[A-Za-z]", word):
            found.append((word[1], (word[2:] or value).strip("\"'")))
    return found


def _settings(content: JsonObject, sampler: str, draft: Draft) -> None:
    for prompt in (draft.values["prompt"], draft.values["negative_prompt"]):
        for name in _EMBEDDING.findall(prompt):
            draft.note(f"<{name}> in its prompts means the textual inversion {name}, if InvokeAI had it")
    for name in ("seed", "steps", "width", "height"):
        draft.whole(name, content.get(name))
    draft.number("scale", content.get("cfg_scale"))
    if skipped := content.get("clip_skip"):  # how many layers are left out
        draft.whole("clip_skip", skipped + 1 if type(skipped) is int else skipped)
    if rescale := content.get("cfg_rescale_multiplier"):
        draft.number("guidance_rescale", rescale)
    choose_sampler(draft, sampler)
    steps = draft.values.get("steps", 0)
    if draft.values["sampler"] != "dpm_solver" and steps and 1000 % steps:
        draft.note(f"its timesteps for {steps} steps are a little lower than those used here")
    image = as_text(content.get("init_image"))
    mode = as_text(content.get("generation_mode") or content.get("type"))
    family, _, kind = mode.rpartition("_")
    if family or (mode and mode not in _MODES):
        draft.note(
            f"it was made in the mode {mode[:50]}, which is not known here; its settings are used for SD v1"
        )
    if image or kind in _MODES[1:]:
        draft.start_from(file_name(image), content.get("strength", content.get("strength_steps", 0.75)))
    if kind in ("inpaint", "outpaint"):
        draft.note(f"the part of the image that {kind} repaints is not in the file; give it with --mask")
    for name in _NOT_HERE:
        draft.leave_out(name, content.get(name))
    for name, entities in as_object(content.get("canvas_v2_metadata")).items():
        is_used = name in _ON_CANVAS and any(entity.get("isEnabled", True) for entity in objects_of(entities))
        draft.leave_out(name, is_used and "of its canvas")


def _split_command(text: str) -> tuple[str, str]:
    """Splits a command into prompt and options. Versions 1.x quoted the prompt without escaping quotes in it."""
    text = text.strip()
    if text.startswith('"'):
        for match in itertools.islice(_CLOSING.finditer(text, 1), 200):
            if text.count('"', match.end()) % 2 == 0:
                return text[1 : match.start()].replace('\\"', '"'), text[match.end() :]
    option = _FIRST_OPTION.search(text) or _ANY_OPTION.search(text)
    return (text[: option.start()], text[option.start() :]) if option else (text, "")


def _split_prompt(text: str, draft: Draft) -> None:
    if _WEIGHTED.search(text):
        draft.note("numbers after a colon in its prompt are weights to InvokeAI; here they are text")
    draft.values["prompt"] = " ".join(_UNWANTED.sub(" ", text).split())
    draft.values["negative_prompt"] = " ".join(_UNWANTED.findall(text))


def _object(text: str) -> JsonObject:
    try:
        content = load_json(text)
    except ValueError:
        raise InputError("it is not JSON") from None
    if not isinstance(content, dict):
        raise InputError("it is not a JSON object")
    return content


def _number(text: str) -> int | float | None:
    try:
        return int(text) if re.fullmatch("-?[0-9]{1,20}", text) else float(text)
    except ValueError:
        return None
