"""Reads the record of this toolkit."""

from __future__ import annotations

from collections.abc import Mapping

from ldm.job import Job
from ldm.metadata.recipe import UNKNOWN, Origin, Recipe, checked
from ldm.metadata.record import read_record
from ldm.util import printable


def read(text: str, _: Origin = UNKNOWN) -> Recipe:
    """Reads the recipe of an image with a record."""
    job, extras, unknown = read_record(text)
    notes = [f"a newer version wrote {printable(name)[:100]}, which is left out" for name in unknown[:20]]
    return recipe(job, extras, notes)


def recipe(job: Job, extras: Mapping[str, str], notes: list[str]) -> Recipe:
    """Returns the recipe of an image of this toolkit. Folders in the file are dropped: it is untrusted."""
    job = checked(job)
    if note := start_note(job):
        notes = [*notes, note]
    model, digest = extras.get("Model", ""), extras.get("Model hash", "")
    return Recipe(job, "ldm", model, digest, dict(extras), tuple(notes))


def start_note(job: Job) -> str:
    """Returns a note on the start image that a file does not contain; empty without a start image."""
    if job.init is None:
        return ""
    return f"it starts from the image {printable(job.init.image)}, which the file does not hold"
