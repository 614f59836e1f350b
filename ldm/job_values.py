"""The values of a job's fields: set by options, changed, read from files, and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from ldm.field import INIT
from ldm.fields import FIELDS, SETTINGS
from ldm.job import Init, Job
from ldm.seeds import check_seed
from ldm.setting import shown
from ldm.util import InputError, is_list


def values_of_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values that parsed options give to fields, by field; None and switches that are off give none.

    Of several images to start from it is the first.
    """
    values: dict[str, Any] = {}
    for row in FIELDS:
        value = options.get(row.dest) if row.option else None
        if is_list(value) and not isinstance(value, tuple):
            value = tuple(value) if row.entry is not None else next(iter(value), None)
        value = next((switch.value for switch in row.switches if options.get(switch.option)), value)
        if value is not None:
            values[row.name] = value
    return values


def override(job: Job, values: Mapping[str, Any]) -> Job:
    """Returns the job with other values, by field; `init.` and a field change its image, `init` None removes it.

    A sampler whose name contains a schedule sets both, unless the schedule is given too. Raises ValueError if a job
    without an image gets only other fields of one.
    """
    if "/" in (values.get("sampler") or ""):
        sampler, schedule = values["sampler"].split("/")
        values = {"schedule": schedule, **values, "sampler": sampler}
    of_init = {name.removeprefix(INIT): v for name, v in values.items() if name.startswith(INIT)}
    own = {name: v for name, v in values.items() if name != "init" and not name.startswith(INIT)}
    start = None if "init" in values else job.init
    if of_init and start is None:
        if "image" not in of_init:
            raise ValueError(f"{', '.join(of_init)} of an image to start from, but there is none; give one")
        start = Init(of_init["image"])
    return replace(job, init=replace(start, **of_init) if start is not None else None, **own)


# values in files are read exactly, even if a run refuses them
_HELD = {name: replace(setting, strict=False) for name, setting in SETTINGS.items()}


def values_of(job: Job) -> dict[str, Any]:
    """Returns the values of a job by field, those of its image, if it has one, prefixed with `init.`."""
    own = {one.name: getattr(job, one.name) for one in fields(Job) if one.name != "init"}
    return own | ({INIT + one.name: getattr(job.init, one.name) for one in fields(Init)} if job.init else {})


def read_held(name: str, value: Any) -> Any:
    """Reads a field's value, as a job holds it, from the text of a file. InputError names the field."""
    setting = _HELD[name]
    if not setting.fits(value):
        raise InputError(f"job.{name} cannot be {shown(value)}; give {setting.wanted()}")
    return setting.check(value)


def check_fields(job: Job) -> None:
    """Checks that every field of a job has a valid value, else raises an InputError that names the field."""
    for name, value in values_of(job).items():
        try:
            SETTINGS[name].check(value)
        except ValueError as error:
            raise InputError(f"{name} {error}") from None
    check_seed(job.seed, job.rng)
    if job.variation_strength:
        check_seed(job.variation_seed, job.rng)
