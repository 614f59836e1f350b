"""Writes and reads the record of an image, in addition to its infotext: JSON that loses nothing of the job.

{"version": 1, "job": {"prompt": "...", "seed": 42, "init": null, ...}, "extras": {"Model hash": "...", ...}}

The fields of the job are those of `ldm.job.Job`, so a field that is added there is recorded, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import NamedTuple

from ldm.fields import MAX_TEXT, SETTINGS
from ldm.job import V1_DEFAULTS, Job, lora_name
from ldm.job_values import override, read_held
from ldm.json_value import JsonObject, as_object, load_json
from ldm.metadata.infotext import file_name, to_json
from ldm.setting import shown
from ldm.util import InputError, printable

VERSION = 1


class Record(NamedTuple):
    """The content of a record. `unknown` names entries of the job that a newer version of this toolkit wrote."""

    job: Job
    extras: dict[str, str]
    unknown: tuple[str, ...]


class FieldError(InputError):
    """A record of this toolkit has a field with an invalid value."""


def record(job: Job, extras: Mapping[str, str]) -> str:
    """Returns the record of an image: `job` and `extras`; empty extras are left out.

    Of the job's files only the names are recorded, as in the infotext.
    """
    held = {key: value for key, value in extras.items() if value}
    return to_json({"version": VERSION, "job": asdict(without_folders(job)), "extras": held})


def read_record(text: str) -> Record:
    """Reads a record; fields that it lacks have the values of `V1_DEFAULTS`.

    Raises InputError for a text that is not a record, and `FieldError` for an invalid value of a field.
    """
    try:
        content = as_object(load_json(text))
    except ValueError:
        raise InputError("the record is not JSON") from None
    job = content.get("job")
    if not isinstance(job, dict):
        raise InputError("the record holds no job")
    unknown: list[str] = []
    try:
        decoded = _decoded(job, unknown)
    except ValueError as error:
        raise FieldError(f"the record is not usable: {printable(error)}") from None
    extras = as_object(content.get("extras"))
    held = {key: v for key, v in extras.items() if isinstance(v, str) and len(v) <= MAX_TEXT}
    return Record(decoded, held, tuple(unknown))


def without_folders(job: Job) -> Job:
    """Returns `job` with file names without folders, as in the infotext: folders are private to the user."""
    loras = tuple((lora_name(file_name(name)), *weights) for name, *weights in job.loras)
    controls = tuple((file_name(file), file_name(image), *rest) for file, image, *rest in job.controls)
    job = replace(job, loras=loras, controls=controls)
    if job.init is None:
        return job
    return replace(
        job, init=replace(job.init, image=file_name(job.init.image), mask=file_name(job.init.mask))
    )


def _decoded(content: JsonObject, unknown: list[str]) -> Job:
    """Returns the job of a JSON object, without unknown entries, and their names. Raises ValueError."""
    if "prompt" not in content:
        raise ValueError("job lacks prompt")
    init = content.get("init")
    if not (init is None or isinstance(init, dict)):
        raise ValueError(f"job.init cannot be {shown(init)}; give an object or null")
    if isinstance(init, dict) and "image" not in init:
        raise ValueError("job.init lacks image")
    held = {name: value for name, value in content.items() if name != "init"}
    held |= {f"init.{name}": value for name, value in (init or {}).items()}
    unknown += [f"job.{name}" for name in held if name not in SETTINGS]
    return override(V1_DEFAULTS, {name: read_held(name, v) for name, v in held.items() if name in SETTINGS})
