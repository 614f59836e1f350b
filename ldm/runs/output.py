"""Writes finished images to files during sampling: checked, watermarked, with the metadata that recreates them."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from ldm.job import Job
from ldm.runs.messages import OF_EACH
from ldm.runs.options import RunOptions
from ldm.util import InputError, need, open_regular, printable

if TYPE_CHECKING:
    import numpy as np
    import torch

    from ldm.images.writer import RunFolder
    from ldm.pipeline import Picture
    from ldm.runs.progress import Events
    from ldm.runs.run_file import RunFile
    from ldm.safety.screen import Screen, Verdict

logger = logging.getLogger("ldm")

WAITING_BATCHES = 4  # finished batches that may wait for the disk before sampling waits too
LAST_WRITE_SECONDS = 5  # seconds that a run that is interrupted twice waits for the file being written
GALLERY_MARK = "<!-- written by ldm -->\n"

Mark = Callable[["np.ndarray"], "np.ndarray"]


def make_mark(options: RunOptions) -> Mark:
    """Returns the function that watermarks an image; a missing library is reported before the model is loaded."""
    if options.no_watermark:
        return lambda rgb: rgb
    from ldm.images.watermark import INPAINTING_TEXT, TEXT, Watermark

    return Watermark(INPAINTING_TEXT if options.inpaint else TEXT).mark


def make_screen(options: RunOptions, device: torch.device) -> Screen:
    """Returns the safety check that --safety selects."""
    from ldm.safety.load import OWN_FOLDER, find_safety_model, load_safety_model
    from ldm.safety.screen import Screen

    path = None if options.safety == "off" else find_safety_model(options.safety_model)
    if path is not None:
        checker = load_safety_model(path, device)
        return Screen(checker, checker.side)
    where = f"put the files of CompVis/stable-diffusion-safety-checker into {OWN_FOLDER}"
    need(options.safety != "on", f"--safety on: no safety model found; {where}")
    if options.safety == "auto":
        logger.info("safety check: no model found, images are unchecked; %s", where)
    return Screen(None)


class Background:
    """Runs tasks in order on one thread, with a short queue; the first error ends it.

    The error is raised by the next `put` or `wait`, in the thread that calls it. The thread never delays the end of
    the process.
    """

    def __init__(self, size: int = WAITING_BATCHES) -> None:
        self._tasks: queue.Queue[Callable[[], object]] = queue.Queue(size)
        self._error: BaseException | None = None
        self._stopped = False
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def put(self, task: Callable[[], object]) -> None:
        """Queues `task`; waits while the queue is full."""
        self._raise()
        self._tasks.put(task)

    def wait(self) -> None:
        """Returns when all tasks are done."""
        self._tasks.join()
        self._raise()

    def recover(self) -> None:
        """Returns when all tasks are done, and clears the error that ended the thread."""
        self._tasks.join()
        self._error = None

    def stop(self) -> None:
        """Drops the tasks that have not begun, and waits a few seconds for the current one."""
        self._stopped = True
        with contextlib.suppress(queue.Full):  # then the thread is busy, and will see the flag
            self._tasks.put_nowait(lambda: None)
        self._thread.join(LAST_WRITE_SECONDS)

    def _work(self) -> None:
        while not self._stopped:
            task = self._tasks.get()
            try:
                if self._error is None and not self._stopped:
                    task()
            except BaseException as error:  # noqa: BLE001 - it is raised where the run can end in order
                self._error = error
            finally:
                self._tasks.task_done()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error


class Present:
    """The images of a run whose files exist: `whole` ones, and with `verify` those that are `damaged`."""

    def __init__(self, run: RunFile, verify: bool) -> None:
        there = run.existing()
        self.damaged = {i for i in there if verify and not _is_whole(run.sample_path(i))}
        self.whole = there - self.damaged
        for i in sorted(self.damaged):
            logger.warning("%s is damaged and will be replaced", printable(run.sample_path(i)))

    def lacks(self, indices: Sequence[int]) -> bool:
        """Returns whether an image of a batch is missing."""
        return any(i not in self.whole for i in indices)


class Output:
    """Writes finished images: image i of the run to the file of its number, and a grid of all of them.

    Everything is done on a background thread: `add` returns at once unless several batches are queued, and raises
    errors of earlier ones. Where torch computes on the CPU (`on_cpu`), its part is done by `add`: a second thread
    would start a second pool of torch's threads, and both would compete for the cores. As a context manager it
    completes the queue on exit, except when the process is interrupted. `screen`, `mark` and `extras` come from the
    run, `run` is the claim on numbers and `present` its existing images; with `shared` other processes make images of
    the run too, with `name_files` each file's path is printed.
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
    ) -> None:
        self._options, self._run, self._mark, self._screen, self._extras = options, run, mark, screen, extras
        self._folder, self._events = folder, events
        self._present, self._name_files = present, name_files
        self._new_sheet = partial(_Sheet, folder.path, run, columns, mark)
        self._on_cpu, self._shared = on_cpu, shared
        self._sheet = None if options.skip_grid or shared else self._new_sheet()
        self._background = Background()
        self._last = time.monotonic()
        self.saved = self.failed = 0
        if self._sheet is not None and not options.skip_save:
            self._sheet.expect(present.whole)

    @property
    def complete(self) -> bool:
        """Returns whether no image of the run is missing."""
        repaired = all(_is_whole(self._run.sample_path(i)) for i in self._present.damaged)
        return repaired and len(self._run.existing()) == self._run.jobs

    def add(self, indices: Sequence[int], finish: Callable[[], Sequence[Picture]]) -> None:
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
            try:
                write_gallery(self._folder.path)
            except InputError as error:
                self.fail("error: no gallery: %s", error)
        return True

    def _in_grid(self, work: Callable[[_Sheet], None]) -> None:
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
        self, indices: Sequence[int], pictures: Sequence[Picture]
    ) -> list[tuple[int, Picture, Verdict]]:
        """Returns the result of the safety check for images; if the check fails, none of them is kept."""
        from ldm.safety.screen import SafetyError

        try:
            verdicts = self._screen.screen([picture.pixels for picture in pictures])
        except SafetyError as error:
            self.failed += len(pictures)
            logger.error("error: %s", error)
            return []
        return list(zip(indices, pictures, verdicts, strict=True))

    def _take(self, pictures: Sequence[tuple[int, Picture, Verdict]]) -> None:
        for entry, (index, picture, verdict) in enumerate(pictures):
            if verdict.pixels is None:
                self._report_not_finite(picture.job)
            else:
                notes = {**_batch_notes(picture.job, entry, len(pictures)), **picture.notes}
                self._write(index, picture, verdict.pixels, {**notes, "Safety": verdict.word})

    def _report_not_finite(self, job: Job) -> None:
        self.fail(
            "error: the model gave no finite image for seed %d, prompt %s; try --precision full",
            job.seed,
            printable(job.prompt),
        )

    def _write(self, index: int, picture: Picture, pixels: np.ndarray, notes: Mapping[str, str]) -> None:
        """Writes an image that passed the check, watermarked except in the user's original pixels."""
        if notes["Safety"] == "flagged":
            logger.warning("the safety check flagged seed %d, so its picture is blank", picture.job.seed)
        marked = self._mark(pixels)
        if picture.kept is not None:
            marked[picture.kept] = pixels[picture.kept]
        if not self._options.skip_save and not self._publish(index, picture.job, marked, notes):
            return
        in_file = (
            not self._options.skip_save
        )  # the grid shows the pixels of the files, so that it is the same after a resume
        self.saved += 1
        self._in_grid(lambda sheet: sheet.add(index, marked, in_file))

    def _publish(self, index: int, job: Job, pixels: np.ndarray, notes: Mapping[str, str]) -> bool:
        """Publishes an image under its name, or compares it with the existing file; False if neither is possible."""
        from ldm.images.writer import encode_png, holds, publish
        from ldm.metadata.infotext import infotext
        from ldm.metadata.record import record

        extras = {**self._extras(job), **notes}
        data = encode_png(pixels, infotext(job, extras), record=record(job, extras))
        path = self._run.sample_path(index)
        if index in self._present.whole:
            if not holds(path, data):
                logger.warning("%s differs from what was made for it now and is left alone", printable(path))
            return True
        self._run.complete()
        try:
            publish(path, data, overwrite=index in self._present.damaged)
        except FileExistsError:
            self.fail("error: %s appeared during the run and is left alone", printable(path))
            return False
        seconds, self._last = time.monotonic() - self._last, time.monotonic()
        self._events.emit(
            "image",
            path=str(path), index=index, seed=job.seed, sha256=hashlib.sha256(data).hexdigest(),
            seconds=round(seconds, 3),
        )  # fmt: skip
        if self._name_files:
            logger.log(OF_EACH, "%s, seed %d", printable(path), job.seed)
        return True


def _batch_notes(job: Job, entry: int, size: int) -> dict[str, str]:
    """Returns the size of an image's batch and its position there: the last bits depend on both."""
    if job.seed_mode == "batch":  # the pipeline records its position in the run's stream
        return {}
    return {"Batch size": str(size), "Batch pos": str(entry)} if size > 1 else {"Batch size": "1"}


class _Sheet:
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
        if index < self._turn:  # its turn came before its batch was made again
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


def read_pixels(path: Path) -> np.ndarray:
    """Reads the uint8 pixels [H, W, 3] of an image of this run; InputError if the file is damaged."""
    import numpy as np
    from PIL import Image

    try:
        with open_regular(path) as file, Image.open(file, formats=["PNG"]) as image:
            return np.array(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = printable(error).replace(printable(path), "it")
        raise InputError(
            f"{printable(path)} cannot be read ({reason}); --resume --verify makes it again"
        ) from None


def _is_whole(path: Path) -> bool:
    """Returns whether a PNG file is undamaged: every checksum, and the pixels."""
    from PIL import Image

    try:
        with open_regular(path) as file, Image.open(file, formats=["PNG"]) as image:
            image.verify()
        read_pixels(path)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False
    return True


def write_gallery(folder: Path) -> None:
    """Writes gallery.html; replaces only a gallery of this toolkit."""
    from ldm.images.writer import publish
    from ldm.metadata.command import command_alone, remark_alone
    from ldm.runs.gallery import gallery

    path = folder / "gallery.html"
    if os.path.lexists(path) and not _is_own_page(path):
        logger.warning("%s was not written by this tool and is left alone", printable(path))
        return
    text = gallery(folder, command_alone, remark_alone) + GALLERY_MARK
    publish(path, text.encode("utf-8", "backslashreplace"), overwrite=True)


def _is_own_page(path: Path) -> bool:
    """Returns whether a file ends like the galleries written here."""
    mark = GALLERY_MARK.encode()
    try:
        with open_regular(path) as file:
            file.seek(-len(mark), os.SEEK_END)
            return file.read(len(mark)) == mark
    except (OSError, InputError):
        return False
