"""Rendered scenes on disk."""

from __future__ import annotations

import logging
import multiprocessing
import os
import secrets
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from ldm.data.scenes import image_at
from ldm.util import printable

logger = logging.getLogger(__name__)

_CHUNK = 64  # scenes a worker renders at a time


def scenes_path(count: int, split: str, folder: str | Path, size: int = 128) -> Path:
    """Returns the file for the first `count` scenes of a split: uint8 [count, size, size, 3]."""
    return Path(folder) / f"{split}-{size}-{count}.npy"


def render_many(
    count: int,
    split: str,
    folder: str | Path,
    workers: int = 2,
    size: int = 128,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Renders scenes 0 to `count` - 1 of a split into one `.npy` file and returns its path.

    A file that is complete and has the scenes that would be rendered now is kept. `progress` is called with (scenes
    rendered, `count`). More than one worker means new processes: call it below `if __name__ == "__main__"`.
    """
    if count < 1:
        raise ValueError(f"count is {count}, but at least one scene is needed")
    path = scenes_path(count, split, folder, size)
    if _is_current(path, count, split, size):
        logger.info("%s is complete", printable(path))
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")  # another process may render the same
    try:
        np.lib.format.open_memmap(part, "w+", np.uint8, (count, size, size, 3)).flush()
        draw, done = partial(_draw_chunk, part, split), 0
        with multiprocessing.get_context("spawn").Pool(workers) if workers > 1 else _Inline() as pool:
            for drawn in pool.imap_unordered(draw, range(0, count, _CHUNK)):
                done += drawn
                if progress:
                    progress(done, count)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


class _Inline:
    """A pool without processes: the work is done in the calling thread."""

    def __enter__(self) -> _Inline:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    imap_unordered = staticmethod(map)


def _draw_chunk(path: Path, split: str, start: int) -> int:
    """Renders up to `_CHUNK` scenes from `start` into the file; returns their number."""
    images = np.lib.format.open_memmap(path, "r+")
    chunk = images[start : start + _CHUNK]
    for offset in range(len(chunk)):
        chunk[offset] = image_at(start + offset, split, chunk.shape[1])
    images.flush()
    return len(chunk)


def _is_current(path: Path, count: int, split: str, size: int) -> bool:
    """Returns whether the file is complete and its first and last images are as they would be rendered now."""
    try:
        images = np.lib.format.open_memmap(path, "r")
    except (OSError, ValueError):  # missing, truncated or not an array
        return False
    return images.shape == (count, size, size, 3) and all(
        np.array_equal(images[index], image_at(index, split, size)) for index in (0, count - 1)
    )
