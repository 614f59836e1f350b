"""Grids of many images, assembled on disk while the images arrive."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType

import numpy as np

PADDING = 2  # black pixels around every image, and so between neighbours
MAX_PAGE_PIXELS = 2**26  # below the size at which Pillow warns of a decompression bomb


def count_pages(shapes: Iterable[tuple[int, int]], columns: int) -> int:
    """Returns how many pages `GridWriter` makes of images of these heights and widths, in order."""
    pages, shape, count = 0, None, 0
    for now in shapes:
        rows = count // columns
        height = (rows + 1) * (now[0] + PADDING) + PADDING
        width = columns * (now[1] + PADDING) + PADDING
        full = count % columns == 0 and rows > 0 and height * width > MAX_PAGE_PIXELS
        if now != shape or full:
            pages, shape, count = pages + 1, now, 0
        count += 1
    return pages


class GridWriter:
    """Lays out images row by row, `columns` in a row, in black frames of 2 pixels, as `make_grid` does.

    `add` accepts images one by one; `finish` ends the page. Every finished page is passed to `deliver` as a
    read-only uint8 array [H, W, 3]. One page holds a whole run, except that a full page (67 million pixels,
    252 images of 512x512 at 6 columns) or an image of another size starts a new one. A page of one
    image has no frame; a last row that is not full is filled with black.

    Finished rows wait in a nameless temporary file in `folder`: memory holds one row, however long the run.
    """

    def __init__(self, folder: str | Path, columns: int, deliver: Callable[[np.ndarray], object]) -> None:
        if columns < 1:
            raise ValueError(f"a grid needs at least 1 column, not {columns}")
        self._folder, self._columns, self._deliver = Path(folder), columns, deliver
        self._page: _Page | None = None

    def __enter__(self) -> GridWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def add(self, image: np.ndarray) -> None:
        """Adds one uint8 image [H, W, 3]. Raises OSError when the disk is full."""
        if self._page is not None and not self._page.has_room_for(image):
            self.finish()
        if self._page is None:
            self._page = _Page(self._folder, self._columns, image.shape)
        self._page.add(image)

    def finish(self) -> None:
        """Delivers the unfinished page, if there is one; the next image starts another."""
        if self._page is not None:
            sheet = self._page.sheet()
            self.close()
            self._deliver(sheet)

    def close(self) -> None:
        """Discards the unfinished page."""
        if self._page is not None:
            self._page.close()
            self._page = None


class _Page:
    """An unfinished page: full rows in a file, the current row in memory."""

    def __init__(self, folder: Path, columns: int, shape: tuple[int, ...]) -> None:
        self._columns, self._shape = columns, shape
        self._row: list[np.ndarray] = []
        self._rows_written = 0
        self._width = 0  # known with the first row
        self._spool = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - lives as long as the page

    def has_room_for(self, image: np.ndarray) -> bool:
        if image.shape != self._shape:
            return False
        next_height = (self._rows_written + 1) * (self._shape[0] + PADDING) + PADDING
        return self._rows_written == 0 or next_height * self._width <= MAX_PAGE_PIXELS

    def add(self, image: np.ndarray) -> None:
        self._row.append(image)
        if len(self._row) == self._columns:
            self._write_row()

    def sheet(self) -> np.ndarray:
        """Returns the finished page, mapped from the file; it remains valid after `close`."""
        if self._row:
            self._write_row()
        self._spool.write(bytes(PADDING * self._width * 3))
        self._spool.flush()
        height = self._rows_written * (self._shape[0] + PADDING) + PADDING
        sheet = np.memmap(self._spool, np.uint8, mode="r", shape=(height, self._width, 3))
        framed_single = (self._shape[0] + 2 * PADDING, self._shape[1] + 2 * PADDING, 3)
        return sheet[PADDING:-PADDING, PADDING:-PADDING] if sheet.shape == framed_single else sheet

    def close(self) -> None:
        self._spool.close()

    def _write_row(self) -> None:
        height, width, _ = self._shape
        self._width = self._width or len(self._row) * (width + PADDING) + PADDING
        band = np.zeros((PADDING + height, self._width, 3), np.uint8)
        for column, image in enumerate(self._row):
            left = PADDING + column * (width + PADDING)
            band[PADDING:, left : left + width] = image
        self._spool.write(band.data)
        self._rows_written += 1
        self._row.clear()
