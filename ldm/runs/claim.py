"""A run's claim on its image numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ldm.runs.description import Content, describe
from ldm.runs.options import RunOptions
from ldm.runs.plan import Plan
from ldm.runs.run_file import Page, RunFile, TileSides
from ldm.runs.run_folder import find_run, join_run, open_run
from ldm.runs.settings import settings
from ldm.runs.source import Source
from ldm.runs.weights import weight_hashes

if TYPE_CHECKING:
    from ldm.images.writer import RunFolder


class Claim:
    """Reserves the image numbers of a run, or reopens those of the run being resumed.

    Rank 0 reserves; the others receive. `columns` are those of the grid.
    """

    def __init__(self, options: RunOptions, folder: RunFolder, plan: Plan, source: Source) -> None:
        self._options, self._folder, self._plan = options, folder, plan
        self.columns = min(options.n_rows if options.n_rows > 0 else options.n_samples, len(plan))
        self._here = source.here
        self._hashes = {} if self._here.rank else weight_hashes(options, source.ckpt)
        self._settings = settings(options, plan, source)
        self._run: RunFile | None = None

    @property
    def run(self) -> RunFile | None:
        """The run, once it has been claimed."""
        return self._run

    def take(self, tiles: TileSides | None = None) -> RunFile:
        """Claims and returns the run; the first call decides which. A new one notes the `tiles` that were chosen."""
        if self._run is None:
            made_from = self._made_from()
            if self._here.rank:
                self._run = join_run(self._folder, self._here.agree(), made_from)
            else:
                resume, numbers = self._options.resume, self._numbers()
                self._run = open_run(self._folder, made_from, *numbers, self._hashes, resume, tiles)
                if self._here.world > 1:
                    self._run.share()
                self._here.agree(self._run.first)
        return self._run

    def find(self) -> RunFile | None:
        """Returns the run that would be resumed, without a claim on it; None where the folder is empty."""
        return find_run(self._folder, self._made_from(), *self._numbers(), self._hashes)

    def _made_from(self) -> Content:
        return describe(self._plan[:], self._plan.batches(), {"columns": self.columns, **self._settings})

    def _numbers(self) -> tuple[int, dict[Page, int]]:
        """Returns the number of images, and of pages of each kind."""
        from ldm.images.grid import count_pages

        sizes = map(self._plan.finished_size, self._plan)
        pages: dict[Page, int] = {
            "grid": 0 if self._options.skip_grid else count_pages(sizes, self.columns),
            "sheet": sum(1 for _ in self._plan.sheets()),
        }
        return len(self._plan), pages
