"""Shows the images of a sweep as labelled sheets, read from their files."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.runs.existing import read_pixels
from ldm.runs.grids import Mark
from ldm.runs.hints import hint_files
from ldm.runs.plan import Plan
from ldm.runs.run_file import RunFile
from ldm.util import InputError, printable

if TYPE_CHECKING:
    import numpy as np

logger = logging.getLogger("ldm")


def write_sheets(plan: Plan, run: RunFile, mark: Mark, fail: Callable[[str, object], None]) -> None:
    """Writes every sheet of a sweep that has an image, with the saved hints of its first row below.

    One that would be too large is named and left out.

    `fail` is called for each image whose file is damaged; its cell stays empty.
    """
    sweep = plan.prompts.sweep
    if sweep is None:
        return
    existing = run.existing()

    def pixels(index: int) -> np.ndarray | None:
        if index not in existing:
            return None
        try:
            return read_pixels(run.sample_path(index))
        except InputError as error:
            fail("error: %s", error)
            return None

    for page, (title, images) in enumerate(plan.sheets()):
        drawn = [pixels(i) for i in images]
        if all(image is None for image in drawn):
            continue
        hints = list(_hints([run.sample_path(i) for i in images[: len(sweep.columns)]]))
        rows = [*sweep.rows, *(f"hint {i + 1}" if len(hints) > 1 else "hint" for i in range(len(hints)))]
        try:
            sheet = _drawn([*drawn, *itertools.chain(*hints)], rows, sweep.columns, title)
        except InputError as error:
            logger.warning("no sheet for %s: %s", printable(title)[:80], error)
            continue
        run.publish_page("sheet", page, mark(sheet), whole=all(image is not None for image in drawn))


def _hints(images: Sequence[Path]) -> Iterator[list[np.ndarray | None]]:
    """Yields rows of the saved hints of images, the first of each, then the second."""
    files = [hint_files(image) for image in images]
    for row in itertools.zip_longest(*files):
        yield [None if file is None else read_pixels(file) for file in row]


def _drawn(images: list[np.ndarray | None], rows: list[str], columns: list[str], title: str) -> np.ndarray:
    import numpy as np

    from ldm.images.sheet import sheet

    return np.asarray(sheet(images, rows, columns, title))
