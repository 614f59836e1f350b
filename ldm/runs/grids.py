"""The grid of a run, in the order of its images."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.runs.existing import read_pixels

if TYPE_CHECKING:
    import numpy as np

    from ldm.runs.run_file import RunFile


logger = logging.getLogger("ldm")
Mark = Callable[["np.ndarray"], "np.ndarray"]


class OrderedGrid:
    """The run's grid, in the order of the images, whatever order they arrive in.

    An image out of order is read from its file at its turn; an image without a file waits in memory.
    """

    def __init__(self, folder: Path, run: RunFile, columns: int, mark: Mark) -> None:
        from ldm.images.grid import GridWriter

        self._run, self._mark = run, mark
        self._waiting: dict[int, np.ndarray | None] = {}
        self._turn = self._pages = 0
        self._grid = GridWriter(folder, columns, self._deliver)

    def expect(self, indices: set[int]) -> None:
        """Reads these images from their files at their turn, even if they arrive later."""
        self._waiting |= dict.fromkeys(indices)

    def add(self, index: int, pixels: np.ndarray, in_file: bool) -> None:
        if index < self._turn:  # its turn came before its batch was repeated
            return
        if self._turn == index and index not in self._waiting:
            self._grid.add(pixels)
            self._turn += 1
        else:
            self._waiting.setdefault(index, None if in_file else pixels)
        while self._turn in self._waiting:
            self._add_waiting(self._turn)
            self._turn += 1

    def finish(self) -> None:
        """Writes the last page, of the images that there are."""
        for index in sorted(self._waiting):
            self._add_waiting(index)
            self._turn += 1
        self._grid.finish()

    def close(self) -> None:
        self._grid.close()

    def _add_waiting(self, index: int) -> None:
        pixels = self._waiting.pop(index)
        self._grid.add(read_pixels(self._run.sample_path(index)) if pixels is None else pixels)

    def _deliver(self, sheet: np.ndarray) -> None:
        page, self._pages = self._pages, self._pages + 1
        self._run.publish_page("grid", page, self._mark(sheet), whole=self._turn == self._run.jobs)
