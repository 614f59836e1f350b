"""Writes finished images to files during sampling: checked, watermarked, with the metadata that recreates them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from ldm.job import Job
from ldm.runs.background import Background
from ldm.runs.existing import Present, is_whole
from ldm.runs.grids import Mark, OrderedGrid
from ldm.runs.options import RunOptions
from ldm.runs.samples import SampleFiles
from ldm.util import InputError, printable

if TYPE_CHECKING:
    import numpy as np

    from ldm.images.writer import RunFolder
    from ldm.pipeline import GeneratedImage
    from ldm.runs.progress import Events
    from ldm.runs.run_file import RunFile
    from ldm.safety.screen import Screen, Verdict

logger = logging.getLogger("ldm")


class Output:
    """Writes finished images: image i of the run to the file of its number, and a grid of all of them.

    Everything is done on a background thread: `add` returns at once unless several batches are queued, and raises
    errors of earlier ones. Where torch computes on the CPU (`on_cpu`), its part is done by `add`: a second thread
    would start a second pool of torch's threads, and both would compete for the cores. As a context manager it
    completes the queue on exit, except when the process is interrupted. `screen`, `mark` and `extras` come from the
    run, `run` is the claim on numbers and `present` its existing images; with `shared` other processes make images of
    the run too, with `name_files` each file's path is printed; `hints` writes those of a job.
    """

    def __init__(
        self,
        options: RunOptions,
        folder: RunFolder,
        run: RunFile,
        present: Present,
        columns: int,
        mark: Mark,
        screen: Screen,
        extras: Callable[[Job], dict[str, str]],
        events: Events,
        on_cpu: bool = True,
        shared: bool = False,
        name_files: bool = True,
        hints: Callable[[Path, Job], None] | None = None,
    ) -> None:
        self._options, self._folder, self._run, self._present = options, folder, run, present
        self._mark, self._screen = mark, screen
        self._files = SampleFiles(run, present, extras, events, name_files, hints)
        self._new_sheet = partial(OrderedGrid, folder.path, run, columns, mark)
        self._on_cpu, self._shared = on_cpu, shared
        self._sheet = None if options.skip_grid or shared else self._new_sheet()
        self._background = Background()
        self.saved = self.failed = 0
        if self._sheet is not None and not options.skip_save:
            self._sheet.expect(present.whole)

    @property
    def complete(self) -> bool:
        """Whether no image of the run is missing."""
        repaired = all(is_whole(self._run.sample_path(i)) for i in self._present.damaged)
        return repaired and len(self._run.existing()) == self._run.jobs

    def add(self, indices: Sequence[int], finish: Callable[[], Sequence[GeneratedImage]]) -> None:
        """Queues the images of a batch, the run's images `indices`, to be finished, checked and written.

        Raises errors of earlier batches: OSError, InputError.
        """
        if self._on_cpu:
            checked = self._check(indices, finish())
            self._background.put(lambda: self._take(checked))
        else:
            self._background.put(lambda: self._take(self._check(indices, finish())))

    def wait(self) -> None:
        """Returns when everything that was added is written."""
        self._background.wait()

    def give_up(self, error: InputError) -> None:
        """Counts an error that ended the sampling as a failure; raises it if no image was saved."""
        self._background.recover()
        if not self.saved:
            raise error
        self.fail("error: %s", error)

    def fail(self, message: str, *values: object) -> None:
        """Reports and counts one failure."""
        self.failed += 1
        logger.error(message, *values)

    def finish(self, pages: bool = True) -> bool:
        """Completes the queue, then writes the grid of all existing images unless `pages` is off, and the gallery.

        Damaged image files count as a failure. Of several processes the last does it; the others return False.
        """
        self.wait()
        if self._shared:
            if not self.complete:
                return False
            if pages and not self._options.skip_grid:
                self._sheet = self._new_sheet()
                self._sheet.expect(self._run.existing())
        if pages:
            self._in_grid(lambda sheet: sheet.finish())
        if self._options.gallery and self._run.existing():
            from ldm.runs.gallery import write_gallery

            try:
                write_gallery(self._folder.path)
            except InputError as error:
                self.fail("error: no gallery: %s", error)
        return True

    def _in_grid(self, work: Callable[[OrderedGrid], None]) -> None:
        """Works on the grid; if a file that it needs is damaged, no grid is written."""
        if self._sheet is None:
            return
        try:
            work(self._sheet)
        except InputError as error:
            self.fail("error: no grid: %s", error)
            self._sheet.close()
            self._sheet = None

    def __enter__(self) -> Output:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and issubclass(kind, Exception):  # finished images are kept
            with contextlib.suppress(Exception):  # one error is under way already
                self._background.wait()
        self._background.stop()
        if self._sheet is not None:
            self._sheet.close()

    def _check(
        self, indices: Sequence[int], images: Sequence[GeneratedImage]
    ) -> list[tuple[int, GeneratedImage, Verdict]]:
        """Returns the result of the safety check for images; if the check fails, none of them is kept."""
        from ldm.safety.screen import SafetyError

        try:
            verdicts = self._screen.screen([image.pixels for image in images])
        except SafetyError as error:
            self.failed += len(images)
            logger.error("error: %s", error)
            return []
        return list(zip(indices, images, verdicts, strict=True))

    def _take(self, images: Sequence[tuple[int, GeneratedImage, Verdict]]) -> None:
        for entry, (index, image, verdict) in enumerate(images):
            if verdict.pixels is None:
                self._report_not_finite(image.job)
            else:
                notes = {**_batch_notes(image.job, entry, len(images)), **image.notes}
                self._write(index, image, verdict.pixels, {**notes, "Safety": verdict.word})

    def _report_not_finite(self, job: Job) -> None:
        self.fail(
            "error: the model gave no finite image for seed %d, prompt %s; try --precision full",
            job.seed,
            printable(job.prompt),
        )

    def _write(self, index: int, image: GeneratedImage, pixels: np.ndarray, notes: Mapping[str, str]) -> None:
        """Writes an image that passed the check, watermarked except in the user's original pixels."""
        if notes["Safety"] == "flagged":
            logger.warning("the safety check flagged seed %d, so its image is blank", image.job.seed)
        marked = self._mark(pixels)
        if image.kept is not None:
            marked[image.kept] = pixels[image.kept]
        in_file = not self._options.skip_save
        if in_file and not self._files.write(index, image.job, marked, notes):
            path = printable(self._run.sample_path(index))
            self.fail("error: %s appeared during the run and is left alone", path)
            return
        self.saved += 1
        # the grid shows the pixels of the files, so that it is the same after a resume
        self._in_grid(lambda sheet: sheet.add(index, marked, in_file))


def _batch_notes(job: Job, entry: int, size: int) -> dict[str, str]:
    """Returns the size of an image's batch and its position there: the last bits depend on both."""
    if job.seed_mode == "batch":  # the pipeline records its position in the run's stream
        return {}
    return {"Batch size": str(size), "Batch pos": str(entry)} if size > 1 else {"Batch size": "1"}
