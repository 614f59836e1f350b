"""The file in a run's folder that describes it: the claim on its numbers, and the settings that --resume compares.

`run-00000.json` belongs to the run whose first image is samples/00000.png. It is written before the first image and
does not record progress: the images themselves do. The process that holds its lock is the run's.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ldm.files import written_whole
from ldm.runs.description import Content
from ldm.util import InputError, printable

if TYPE_CHECKING:
    import numpy as np

    from ldm.images.writer import RunFolder

logger = logging.getLogger("ldm")


Page = Literal["grid", "sheet"]
TileSides = Mapping[tuple[int, int], int | None]  # by height and width of the images


class RunFile:
    """A run's claim on the numbers of its images and grids; `close` or the end of the process releases it."""

    def __init__(self, folder: RunFolder, content: Content, hashes: Mapping[str, Callable[[], str]]) -> None:
        self._folder, self._content, self._hashes = folder, content, hashes
        self._lock: int | None = None
        self._shared = False
        self._writing = threading.RLock()  # the thread that writes the images completes the file
        self.first: int = content["first"]
        self.jobs: int = content["jobs"]

    @property
    def hashes(self) -> Mapping[str, Callable[[], str]]:
        """For each file of weights, a function that returns its SHA-256."""
        return self._hashes

    @property
    def path(self) -> Path:
        return run_path(self._folder, self.first)

    def sample_path(self, index: int) -> Path:
        """Returns the file of the run's image `index`."""
        return self._folder.path_of("sample", self.first + index)

    def existing(self) -> set[int]:
        """Returns the images whose files exist."""
        numbers = self._folder.numbers("sample")
        return {number - self.first for number in numbers if 0 <= number - self.first < self.jobs}

    def complete(self) -> None:
        """Adds the hashes, which take a while for large files; called before the first image is written."""
        if self._content["sha256"] is None:
            sha256 = {name: digest() for name, digest in self._hashes.items()}
            with self._writing:
                self._content["sha256"] = sha256
                self.write()

    @property
    def tiles(self) -> TileSides | None:
        """The tiles that the run's first process chose, by the images' height and width; None before."""
        noted = self._content.get("tiles")
        if noted is None:
            return None
        return {_size(words): side for words, side in noted.items()}

    def note_tiles(self, sides: TileSides, leads: bool = True, shared: bool = False) -> None:
        """Records the chosen tiles; of several processes the one that `leads` writes them."""
        self._content["tiles"] = {f"{width}x{height}": side for (height, width), side in sides.items()}
        if leads:
            self.write()
            if shared:
                self.share()

    def parts_of(self, first: int) -> list[int] | None:
        """Returns the sizes of the parts of the batch that begins with image `first`; None if it was undivided."""
        return self._content.get("parts", {}).get(str(first))

    def note_parts(self, first: int, sizes: Sequence[int]) -> None:
        """Records that the batch that begins with image `first` is made in parts of these sizes.

        A run of several processes, which share the file, records it only in the images' metadata.
        """
        if self._shared or self.parts_of(first) == list(sizes):
            return
        with self._writing:
            self._content.setdefault("parts", {})[str(first)] = list(sizes)
            self.write()

    def has_pages(self) -> bool:
        """Returns whether every page and sheet of the run exists, of all images."""
        from ldm.images.writer import unfinished_in

        claimed: Mapping[Page, list[int]] = self._content["pages"]
        paths = [
            self._folder.path_of(kind, first + i)
            for kind, (first, count) in claimed.items()
            for i in range(count)
        ]
        return all(path.is_file() and not unfinished_in(path) for path in paths)

    def publish_page(self, kind: Page, page: int, pixels: np.ndarray, whole: bool) -> None:
        """Writes one page of the grid, or one sheet; an incomplete one of an interrupted run is replaced.

        The metadata of such a page state that it is unfinished, and its run, so no run file can cause another image
        to be overwritten.
        """
        from ldm.images.writer import encode_png, holds, publish, unfinished_in

        path = self._folder.path_of(kind, self._content["pages"][kind][0] + page)
        data = encode_png(pixels, unfinished="" if whole else self.path.name)
        with contextlib.suppress(
            FileExistsError
        ):  # of another process of this run, which ended in the same state
            if not os.path.lexists(path):
                publish(path, data)
                return
        if holds(path, data):
            return
        if unfinished_in(path) == self.path.name:
            publish(path, data, overwrite=True)
        else:
            logger.warning("%s was not written by this run and is left alone", printable(path))

    def lock(self) -> None:
        """Locks an existing file for this process; InputError if another process holds it."""
        self._lock = open_run_file(self.path)
        if not try_lock(self._lock):
            self.close()
            raise InputError(f"another process is still working on {printable(self.path)}; wait for it")

    def share(self) -> None:
        """Lets the other processes of the run share the lock; the file is not written after that."""
        self.complete()
        with folder_lock(self._folder.samples_path):
            self.hold()

    def hold(self) -> None:
        """Takes a shared lock on the file."""
        self.close()
        self._shared = True
        self._lock = open_run_file(self.path)
        try_lock(self._lock, shared=True)

    def write(self) -> None:
        """Writes the file, locked before it gets its name."""
        with self._writing:
            with written_whole(self.path, overwrite=True) as part:
                part.write_text(json.dumps(self._content, indent=1) + "\n", encoding="utf-8")
                descriptor = open_run_file(part)
                try_lock(descriptor)
            self.close()
            self._lock = descriptor

    def close(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def run_path(folder: RunFolder, first: int) -> Path:
    return folder.path / f"run-{first:05d}.json"


def _size(words: str) -> tuple[int, int]:
    """Parses height and width from WIDTHxHEIGHT."""
    width, height = words.split("x")
    return int(height), int(width)


def open_run_file(path: Path) -> int:
    """Opens a file to lock it, without blocking on a pipe."""
    return os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))


@contextlib.contextmanager
def folder_lock(folder: Path) -> Generator[None]:
    """Holds an exclusive lock on the folder while numbers are chosen; a no-op where folders cannot be locked."""
    try:
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY)
    except ImportError:  # Windows
        yield
        return
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def try_lock(descriptor: int, shared: bool = False) -> bool:
    """Locks a file until its descriptor is closed; False if another process holds it. Without locks, always True."""
    try:
        import fcntl

        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError) as error:
        logger.debug("no lock: %s", error)
    return True
