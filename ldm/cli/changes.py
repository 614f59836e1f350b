"""Options that change a job that was read from a file."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from typing import Any

from ldm.fields import FIELDS, MASK, START
from ldm.job import DEFAULT_STRENGTH, Job, control_text
from ldm.job_values import override, values_of_options
from ldm.metadata.command import Options, lora_option, text_of
from ldm.util import InputError, is_list

_BEGINS, _MASKS = ("init_img",), ("mask", "outpaint")  # options that give a job a start, and a mask


def _options_of(group: str) -> Iterator[str]:
    """Yields the names of a group's options that need what the group is about."""
    for row in FIELDS:
        if row.group == group:
            yield from (switch.option for switch in row.switches)
            if row.option and row.dest not in (*_BEGINS, *_MASKS):
                yield row.dest


def as_changes(parser: argparse.ArgumentParser) -> None:
    """Removes the defaults of a parser's options: those that are not typed are None."""
    parser.set_defaults(**dict.fromkeys(vars(parser.parse_args([]))))


def texts_of(typed: Mapping[str, Any]) -> Options:
    """Converts parsed options to the texts that were typed."""
    return {name: None if value is True else _typed(name, value) for name, value in typed.items()}


def _typed(name: str, value: Any) -> str | list[str]:
    if name == "lora":
        return [lora_option(*lora) for lora in value]
    if name == "control":
        return [control_text(*control) for control in value]
    if name == "embedding":
        return [path if word is None else f"{path}={word}" for path, word in value]
    if is_list(value) and not isinstance(value, tuple):
        return [str(one) for one in value]
    return text_of(value)


def changed(job: Job, typed: Mapping[str, Any]) -> Job:
    """Returns a job with the typed options. InputError for those that need a starting image, or a mask.

    The size of a job that starts from an image stays unset: it is that of the canvas.
    """
    values = values_of_options(typed)
    begins = job.init is not None or "init_img" in typed or job.strength != 1
    masked = job.init is not None and bool(job.init.mask or job.init.alpha_mask)
    masked = masked or "mask" in typed or "outpaint" in typed
    for names, there, what in (
        ((*_options_of(START), *_MASKS), begins, "an image to start from; give one with --init-img"),
        (_options_of(MASK), masked, "a mask; give one with --mask"),
    ):
        for name in names:
            if name in typed and not there:
                raise InputError(f"--{name} needs {what}")
    if masked and values.get("upscale", 1) != 1:
        raise InputError("--upscale does not go with a mask; leave it out")
    if masked and "mask" in typed:
        values["init.alpha_mask"] = False
    elif masked and not (job.init is not None and job.init.mask):
        values["init.alpha_mask"] = True
    if begins:
        values = {**_new_start(job, values, masked), **values}
        values |= _as_canvas(job, values)
    try:
        return override(job, values)
    except ValueError as error:
        raise InputError(str(error)) from None


def _new_start(job: Job, values: Mapping[str, Any], masked: bool) -> dict[str, Any]:
    """Returns the values that turn a job from text into one that starts from an image, which fills its size."""
    if job.init is not None or job.strength != 1:
        return {}
    size = {"init.width": job.width, "init.height": job.height, "init.resize": "fill"}
    return size | {"strength": 1.0 if masked else DEFAULT_STRENGTH}


def _as_canvas(job: Job, values: dict[str, Any]) -> dict[str, Any]:
    """Converts a typed size to the canvas's size, with a way to resize."""
    sides = {f"init.{name}": values.pop(name) for name in ("width", "height") if name in values}
    if not sides or "init.resize" in values or (job.init is not None and job.init.resize != "none"):
        return sides
    return {**sides, "init.resize": "fill" if len(sides) == 2 else "fit"}
