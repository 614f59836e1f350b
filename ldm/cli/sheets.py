"""A sweep's pictures as labelled sheets, from their files."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from ldm.cli.manifest import RunFile
from ldm.cli.output import Mark, read_pixels
from ldm.cli.plan import Plan
from ldm.util import InputError, printable

if TYPE_CHECKING:
    import numpy as np

logger = logging.getLogger("ldm")


def write_sheets(plan: Plan, run: RunFile, mark: Mark) -> None:
    """Writes every sheet of a sweep of which a picture is there; one that would be too large is told and left out."""
    sweep = plan.wishes.sweep
    if sweep is None:
        return
    existing = run.existing()
    for page, (title, images) in enumerate(plan.sheets()):
        pictures = [read_pixels(run.sample_path(i)) if i in existing else None for i in images]
        if all(picture is None for picture in pictures):
            continue
        try:
            data = _encoded(pictures, sweep.rows, sweep.columns, title, mark)
        except InputError as error:
            logger.warning("no sheet for %s: %s", printable(title)[:80], error)
            continue
        run.publish_page("sheet", page, data, whole=all(picture is not None for picture in pictures))


def _encoded(
    pictures: list[np.ndarray | None], rows: list[str], columns: list[str], title: str, mark: Mark
) -> bytes:
    import numpy as np

    from ldm.images.sheet import sheet
    from ldm.images.writer import encode_png

    return encode_png(mark(np.asarray(sheet(pictures, rows, columns, title))))
