"""The files of a run's images, one each, with the metadata that recreates them."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.job import Job
from ldm.runs.existing import Present
from ldm.runs.messages import OF_EACH
from ldm.runs.run_file import RunFile
from ldm.util import printable

if TYPE_CHECKING:
    import numpy as np

    from ldm.runs.progress import Events

logger = logging.getLogger("ldm")


class SampleFiles:
    """Writes each image of a run to the file of its number, whole or not at all.

    `extras` returns the model's part of a job's metadata. With `name_files` the path of each file is
    logged; `hints` writes those of a job, given the file of its image.
    """

    def __init__(
        self,
        run: RunFile,
        present: Present,
        extras: Callable[[Job], dict[str, str]],
        events: Events,
        name_files: bool = True,
        hints: Callable[[Path, Job], None] | None = None,
    ) -> None:
        self._run, self._present, self._extras = run, present, extras
        self._events, self._name_files = events, name_files
        self._hints = hints
        self._last = time.monotonic()

    def write(self, index: int, job: Job, pixels: np.ndarray, notes: Mapping[str, str]) -> bool:
        """Writes the run's image `index` under its name, or compares it with the existing file.

        `pixels` are uint8 [H, W, 3]; `notes` join the metadata. Returns False, and writes nothing, if a file of this
        name appeared during the run.
        """
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
            return False
        if self._hints is not None:
            self._hints(path, job)
        seconds, self._last = time.monotonic() - self._last, time.monotonic()
        self._events.emit(
            "image",
            path=str(path), index=index, seed=job.seed, sha256=hashlib.sha256(data).hexdigest(),
            seconds=round(seconds, 3),
        )  # fmt: skip
        if self._name_files:
            logger.log(OF_EACH, "%s, seed %d", printable(path), job.seed)
        return True
