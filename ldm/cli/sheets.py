"""A sweep's pictures as labelled sheets, from their files: sheet-0000.png and so on in the run's folder."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.cli.output import Mark, read_pixels
from ldm.cli.plan import Plan
from ldm.util import InputError, printable

if TYPE_CHECKING:
    import numpy as np

logger = logging.getLogger("ldm")


def write_sheets(plan: Plan, folder: Path, sample_path: Callable[[int], Path], mark: Mark) -> None:
    """Writes every sheet of a sweep of which a picture is there; one that would be too large is told and left out.

    `sample_path` gives the file of an image of the run.
    """
    sweep = plan.wishes.sweep
    if sweep is None:
        return
    numbers = itertools.count()
    for title, images in plan.sheets():
        pictures = [_pixels(sample_path(i)) for i in images]
        if all(picture is None for picture in pictures):
            continue
        try:
            data = _encoded(pictures, sweep.rows, sweep.columns, title, mark)
        except InputError as error:
            logger.warning("no sheet for %s: %s", printable(title)[:80], error)
            continue
        _publish(folder, numbers, data)


def _pixels(path: Path) -> np.ndarray | None:
    return read_pixels(path) if path.exists() else None


def _encoded(
    pictures: list[np.ndarray | None], rows: list[str], columns: list[str], title: str, mark: Mark
) -> bytes:
    import numpy as np

    from ldm.images.sheet import sheet
    from ldm.images.writer import encode_png

    return encode_png(mark(np.asarray(sheet(pictures, rows, columns, title))))


def _publish(folder: Path, numbers: itertools.count[int], data: bytes) -> None:
    """Gives a sheet the next free name; one that an earlier run of the same left is taken for it."""
    from ldm.images.writer import publish

    for number in numbers:
        path = folder / f"sheet-{number:04d}.png"
        if not path.exists():
            publish(path, data)
            return
        if path.read_bytes() == data:
            return
