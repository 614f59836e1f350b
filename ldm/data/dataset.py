"""Rendered scenes on disk, and the torch data set that reads them."""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from torch.utils.data import Dataset

from ldm.data.captions import caption
from ldm.data.scenes import image_at, scene_at
from ldm.util import InputError, printable

logger = logging.getLogger(__name__)

_CHUNK = 64  # scenes a worker draws at a time


class Example(TypedDict):
    """One item: the picture [H, W, 3] as float32 in [-1, 1], a caption, and the number of its scene."""

    image: torch.Tensor
    caption: str
    index: int


def scenes_path(count: int, split: str, folder: str | Path, size: int = 128) -> Path:
    """The file that holds the first `count` scenes of a split: uint8 [count, size, size, 3]."""
    return Path(folder) / f"{split}-{size}-{count}.npy"


def render_many(
    count: int,
    split: str,
    folder: str | Path,
    workers: int = 2,
    size: int = 128,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Draws scenes 0 to `count` - 1 of a split into one `.npy` file and returns its path.

    A file that is there, whole and still what would be drawn now is left alone. `progress` hears (scenes
    drawn, `count`). More than one worker means new processes: call it below `if __name__ == "__main__"`.
    """
    if count < 1:
        raise ValueError(f"count is {count}, but at least one scene is needed")
    path = scenes_path(count, split, folder, size)
    if _is_current(path, count, split, size):
        logger.info("%s is complete", printable(path))
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".npy.part")
    np.lib.format.open_memmap(part, "w+", np.uint8, (count, size, size, 3)).flush()
    draw, done = partial(_draw_chunk, part, split), 0
    with multiprocessing.get_context("spawn").Pool(workers) if workers > 1 else _Inline() as pool:
        for drawn in pool.imap_unordered(draw, range(0, count, _CHUNK)):
            done += drawn
            if progress:
                progress(done, count)
    os.replace(part, path)
    return path


class SceneImages(Dataset[Example]):
    """The scenes that `render_many` drew, each with a caption that changes from epoch to epoch.

    `crop`: side in pixels of the random square that is cut out; the whole picture if None. Call `set_epoch`
    before each epoch (workers that outlive an epoch keep the old one). The same index and epoch give the same
    item. Nothing is ever mirrored: captions tell left from right.
    """

    def __init__(
        self, count: int, split: str, folder: str | Path, size: int = 128, crop: int | None = None
    ) -> None:
        self.path = scenes_path(count, split, folder, size)
        if not self.path.is_file():
            raise InputError(f"{printable(self.path)} is missing; draw it with ldm.data.dataset.render_many")
        if crop is not None and not 1 <= crop <= size:
            raise ValueError(f"crop is {crop}, but the pictures are {size} pixels wide")
        self.count, self.split, self.size, self.crop = count, split, size, crop
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the captions (and crops) of this epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < self.count:
            raise IndexError(f"index {index} is outside 0 to {self.count - 1}")
        rng = np.random.default_rng([index, self.epoch])
        text = caption(scene_at(index, self.split), rng)
        pixels = np.load(self.path, mmap_mode="r")[index]  # opened anew: a map cannot travel to workers
        if self.crop is not None:
            top, left = rng.integers(self.size - self.crop + 1, size=2)
            pixels = pixels[top : top + self.crop, left : left + self.crop]
        image = torch.from_numpy(pixels.astype(np.float32) / 127.5 - 1)
        return {"image": image, "caption": text, "index": index}


class _Inline:
    """A pool of no processes: the work is done where it is asked for."""

    def __enter__(self) -> _Inline:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    imap_unordered = staticmethod(map)


def _draw_chunk(path: Path, split: str, start: int) -> int:
    """Draws up to `_CHUNK` scenes from `start` into the file; returns how many."""
    pictures = np.lib.format.open_memmap(path, "r+")
    chunk = pictures[start : start + _CHUNK]
    for offset in range(len(chunk)):
        chunk[offset] = image_at(start + offset, split, chunk.shape[1])
    pictures.flush()
    return len(chunk)


def _is_current(path: Path, count: int, split: str, size: int) -> bool:
    """Whether the file is whole and its first and last pictures are what would be drawn now."""
    try:
        pictures = np.lib.format.open_memmap(path, "r")
    except (OSError, ValueError):  # missing, cut short or something else
        return False
    return pictures.shape == (count, size, size, 3) and all(
        np.array_equal(pictures[index], image_at(index, split, size)) for index in (0, count - 1)
    )
