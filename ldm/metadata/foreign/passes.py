"""Detects in an infotext a second pass and a start image, which do not exclude each other."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from ldm.metadata.foreign.entries import NOTHING, positive
from ldm.metadata.recipe import Draft, Origin
from ldm.util import InputError, printable

# entries that only a job with a start image has; a denoising strength is not one of them
_OF_A_START = (
    "Init image hash", "Init image size-1", "Mask blur", "Mask mode", "Masked content", "Inpaint area",
    "Masked area padding", "Mask weight", "Resize mode", "Image CFG scale", "Noise multiplier",
)  # fmt: skip
_SCRIPTS_OF_A_START = ("Soft inpainting", "SD upscale", "Ultimate SD upscale", "Loopback")
_OF_A_MASK = ("Mask blur", "Mask mode", "Masked content", "Inpaint area", "Mask weight")
_FROM_AN_IMAGE = {"img2img", "inpaint"}
_USUAL_STRENGTH, _USUAL_FACTOR = 0.75, 2.0  # of the web UI


def second_pass(entries: dict[str, str], origin: Origin, draft: Draft) -> bool:
    """Returns whether there is a second pass; its size becomes a factor of the first pass's."""
    first = _sides(entries, "First pass size")  # versions before 2023
    resize = [_sides(entries, key) for key in ("Hires resize", "Hires fixed")]
    target = next((sides for sides in resize if any(sides)), (0, 0))
    upscaler = entries.get("Hires upscaler", "")
    marked = entries.pop("Hires upscale", "")
    factor = positive(marked)
    if not factor and marked.lower() not in (*NOTHING, "0", "0.0"):
        raise InputError(f"the text's entry Hires upscale cannot be {printable(marked[:100])!r}")
    is_old = "First pass size-1" in entries
    has_steps = positive(entries.get("Hires steps", "")) > 0
    if not (is_old or factor or any(target) or upscaler.lower() not in NOTHING or has_steps):
        return False
    if (operations := _operations(entries)) and "txt2img" not in operations and operations & _FROM_AN_IMAGE:
        draft.note("left out: enlarging the image after it is made")
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
        is_larger = origin.size and all(size) and origin.size[0] > size[0]
        factor = origin.size[0] / size[0] if origin.size and is_larger else _USUAL_FACTOR
        draft.note(f"the second pass's size is not given; using {factor:g} times the first")
    if "Hires strength" in entries:
        entries["Denoising strength"] = entries.pop("Hires strength")
    elif entries.get("App") == "SD.Next" and not {"Denoising strength", "Hires force"} & entries.keys():
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


def _operations(entries: Mapping[str, str]) -> set[str]:
    """Returns the operations that SD.Next lists."""
    return set(re.split(r"[;,\s]+", entries.get("Operations", "").lower())) - {"", "none"}


def _sides(entries: Mapping[str, str], key: str) -> tuple[int, int]:
    """Returns a size's width and height, 0 for a side that is not given."""
    sides = [entries.get(f"{key}-{side}", "0") for side in (1, 2)]
    width, height = (int(side) if re.fullmatch("[0-9]{1,5}", side) else 0 for side in sides)
    return width, height


def _size(entries: Mapping[str, str], origin: Origin) -> tuple[int, int]:
    size = _sides(entries, "Size")
    return size if all(size) or origin.size is None else origin.size


def _old_first_pass(width: int, height: int) -> tuple[int, int]:
    """Returns the first pass's size that the web UI of 2022 chose: about 512x512 pixels, in multiples of 64."""
    scale = math.sqrt(512 * 512 / max(1, width * height))
    return math.ceil(scale * width / 64) * 64, math.ceil(scale * height / 64) * 64


def choose_start(entries: Mapping[str, str], strength: float, draft: Draft) -> None:
    """Adds a start image if the text names one, or has a denoising strength and nothing that contradicts it."""
    is_stated = "Denoising strength" in entries
    operations = _operations(entries)
    marks = [key for key in entries if key in _OF_A_START or key.startswith(_SCRIPTS_OF_A_START)]
    if operations:
        if "txt2img" in operations or not operations & _FROM_AN_IMAGE:
            return
    elif not marks and not is_stated:
        return
    elif not marks and strength in (0, 1):  # programs that use the web UI write 0
        draft.note(f"a denoising strength of {strength:g} alone is read as text to image")
        return
    if not is_stated:
        draft.note(f"its denoising strength is not given; using {_USUAL_STRENGTH}")
        strength = _USUAL_STRENGTH
    draft.start_from("", strength)
    if not marks and not operations:
        draft.note(
            "only its denoising strength suggests it; some programs write one for text to image as well"
        )
    if "inpaint" in operations or any(key in entries for key in _OF_A_MASK):
        draft.note("it repaints where a mask is white, and the mask is not in the file; give it with --mask")
