"""The record that a picture carries beside its infotext: JSON that loses nothing of the job.

{"version": 1, "job": {"prompt": "...", "seed": 42, "init": null, ...}, "extras": {"Model hash": "...", ...}}

The fields of the job are those of `ldm.job.Job`, whatever they are, so a field that is added there is kept here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass, replace
from types import UnionType
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from ldm.images.metadata import file_name, to_json
from ldm.job import Job, lora_name
from ldm.util import InputError, printable

KEYWORD = "ldm"  # of the PNG's text chunk
VERSION = 1


class Record(NamedTuple):
    """What a record holds. `unknown` names entries of the job that a newer version of this toolkit wrote."""

    job: Job
    extras: dict[str, str]
    unknown: tuple[str, ...]


def record(job: Job, extras: Mapping[str, str]) -> str:
    """The record of a picture: `job` with `extras` beside it; empty extras are left out.

    Of the job's files only the names are told, as in the infotext.
    """
    held = {key: value for key, value in extras.items() if value}
    return to_json({"version": VERSION, "job": asdict(without_folders(job)), "extras": held})


def read_record(text: str) -> Record:
    """What a record says, exactly; fields that it lacks have the defaults of `Job`.

    Raises InputError for a text that is no record, and for a value that its field cannot have.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        raise InputError("the record is no JSON") from None
    job, extras = (content.get(key) if isinstance(content, dict) else None for key in ("job", "extras"))
    if not isinstance(job, dict):
        raise InputError("the record holds no job")
    unknown: list[str] = []
    try:
        decoded = _decoded(job, Job, "job", unknown)
    except ValueError as error:
        raise InputError(f"the record is of no use: {printable(error)}") from None
    texts = extras if isinstance(extras, dict) else {}
    return Record(decoded, {key: v for key, v in texts.items() if isinstance(v, str)}, tuple(unknown))


def without_folders(job: Job) -> Job:
    """`job` with the names alone of its files, as the infotext has them: their folders are the user's own affair."""
    loras = tuple((lora_name(file_name(name)), *weights) for name, *weights in job.loras)
    job = replace(job, loras=loras)
    if job.init is None:
        return job
    return replace(
        job, init=replace(job.init, image=file_name(job.init.image), mask=file_name(job.init.mask))
    )


def _decoded(value: Any, hint: Any, place: str, unknown: list[str]) -> Any:
    """What JSON gave as a value of the type `hint`; ValueError names the `place` where it is none."""
    options = get_args(hint)
    if is_dataclass(hint) and isinstance(hint, type) and isinstance(value, dict):
        return _decoded_fields(value, hint, place, unknown)
    if isinstance(hint, UnionType):
        inner = next(option for option in options if option is not type(None))
        return None if value is None else _decoded(value, inner, place, unknown)
    if get_origin(hint) is tuple and isinstance(value, list):
        hints = [options[0]] * len(value) if options[1:] == (...,) else options
        if len(hints) == len(value):
            return tuple(_decoded(v, h, place, unknown) for v, h in zip(value, hints, strict=True))
    elif get_origin(hint) is Literal:
        if isinstance(value, str) and value in options:
            return value
    elif hint is float and type(value) is int and abs(value) <= 2**53:
        return float(value)
    elif type(value) is hint and (hint is not float or math.isfinite(value)):
        return value
    shown = f"a {type(value).__name__}" if isinstance(value, (dict, list)) else repr(value)[:100]
    raise ValueError(f"{place} cannot be {shown}")


def _decoded_fields(value: dict[str, Any], cls: type, place: str, unknown: list[str]) -> Any:
    """A dataclass from a JSON object, its unknown entries left out and named."""
    hints = get_type_hints(cls)
    unknown += [f"{place}.{name}" for name in value if name not in hints]
    for field in fields(cls):
        if field.name not in value and field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"{place} lacks {field.name}")
    known = {name: v for name, v in value.items() if name in hints}
    return cls(**{name: _decoded(v, hints[name], f"{place}.{name}", unknown) for name, v in known.items()})
