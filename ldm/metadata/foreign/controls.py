"""ControlNets in the text of the web UI's extension: `ControlNet 0: "Module: canny, Model: ..., Weight: 1, ..."`."""

from __future__ import annotations

import re

from ldm.metadata.recipe import Draft

_ENTRY = re.compile(r"ControlNet(?: (\d{1,2}))?")
_PAIR = re.compile(r"([A-Za-z][\w /]*?): (\([^()]*\)|[^,]*)(?:, |$)")
_IMAGE_PROMPT = re.compile("ip-?adapter")  # ip-adapter_clip_sd15, and CLIP-ViT-H (IPAdapter) of Forge
_HASH = re.compile(r" \[[0-9a-fA-F]{6,}\]$")
# the hints that are made here; a module of any other name is a network, or a method that is not here
_HINTS = {
    "none": "none", "canny": "canny", "tile_resample": "tile", "inpaint": "inpaint", "inpaint_only": "inpaint",
    "inpaint_global_harmonious": "inpaint",
}  # fmt: skip
_MODES = {
    "balanced": "balanced",
    "my prompt is more important": "prompt",
    "controlnet is more important": "control",
}
_RESIZES = {"just resize": "stretch", "crop and resize": "fill", "resize and fill": "pad"}


def read_controls(entries: dict[str, str], draft: Draft) -> None:
    """Takes the entries of the extension out of a text's, and adds its units to the draft."""
    units = {key: entries.pop(key) for key in sorted(entries) if _ENTRY.fullmatch(key)}
    for key, text in units.items():
        pairs = {name.lower(): value.strip() for name, value in _PAIR.findall(text)}
        name = _HASH.sub("", pairs.get("model", ""))
        if name.lower() in ("", "none"):
            draft.leave_out(key, text)
            continue
        start, end = _interval(pairs)
        module = (pairs.get("module") or pairs.get("preprocessor") or "none").lower()
        is_prompt = _IMAGE_PROMPT.search(module) is not None
        needs = "the IP-Adapter {} and its {}" if is_prompt else "the ControlNet {} and its hint {}"
        draft.control(name, "", _number(pairs.get("weight"), 1.0), start, end, needs)
        if is_prompt:
            continue
        _set(draft, "hint", _HINTS.get(module, "none"))
        if module not in _HINTS:
            draft.note(f"its hint was made by {module[:60]}; give that image with --control")
        _set(draft, "control_mode", _MODES.get(pairs.get("control mode", "balanced").lower(), "balanced"))
        _set(draft, "control_resize", _RESIZES.get(pairs.get("resize mode", "").lower(), "fill"))


def _interval(pairs: dict[str, str]) -> tuple[float, float]:
    """The shares of the steps: two entries, or in older versions a pair in brackets."""
    words = pairs.get("starting/ending", "").strip("()").split(",")
    both = words if len(words) == 2 else [pairs.get("guidance start", "0"), pairs.get("guidance end", "1")]
    return _number(both[0], 0.0), _number(both[1], 1.0)


def _number(text: str | None, usual: float) -> float:
    try:
        return float(text or usual)
    except ValueError:
        return usual


def _set(draft: Draft, name: str, value: str) -> None:
    """Sets a field that all units of a job share; a second unit of another value is noted."""
    if draft.values.setdefault(name, value) != value:
        draft.note(f"its ControlNets differ in {name}: {value} is left out")
