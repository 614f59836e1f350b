"""Shows the images of a sweep as labelled sheets, read from their files."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from ldm.runs.existing import read_pixels
from ldm.runs.grids import Mark
from ldm.runs.plan import Plan
from ldm.runs.run_file import RunFile
from ldm.util import InputError, printable

if TYPE_CHECKING:
    import numpy as np

logger = logging.getLogger("ldm")


def write_sheets(plan: Plan, run: RunFile, mark: Mark, fail: Callable[[str, object], None]) -> None:
    """Writes every sheet of a sweep that has an image; one that would be too large is named and left out.

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
        try:
            sheet = _drawn(drawn, sweep.rows, sweep.columns, title)
        except InputError as error:
            logger.warning("no sheet for %s: %s", printable(title)[:80], error)
            continue
        run.publish_page("sheet", page, mark(sheet), whole=all(image is not None for image in drawn))


def _drawn(images: list[np.ndarray | None], rows: list[str], columns: list[str], title: str) -> np.ndarray:
    import numpy as np

    from ldm.images.sheet import sheet

    return np.asarray(sheet(images, rows, columns, title))
