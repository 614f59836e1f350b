"""Features of images: computed in batches, kept on disk by the content of each image, read as one mapped array."""

from __future__ import annotations

import logging
import sqlite3
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ldm.evaluation.images import ImageSet, Item
from ldm.evaluation.resize import crop_to
from ldm.places import cache_path
from ldm.runs.progress import NEWS_SECONDS, in_words
from ldm.util import InputError, need, printable

logger = logging.getLogger("ldm")
BATCH = 32
_READERS = 2  # threads that read files meanwhile


class Network(Protocol):
    """A network that measures images. `identity` names everything that its features depend on."""

    name: str
    width: int
    resize: str
    identity: str
    weights: str

    def prepare(self, pixels: np.ndarray) -> Tensor:
        """Returns the network's input [3, side, side] for an image, uint8 [H, W, 3]."""
        ...

    def features(self, x: Tensor) -> Tensor:
        """Returns float32 features [N, width] of inputs [N, 3, side, side]."""
        ...


class Kept(NamedTuple):
    """The features of an image, float32 [width], and its height and width in pixels."""

    size: tuple[int, int]
    features: np.ndarray


class FeatureCache:
    """Features on disk, by the network and the SHA-256 of the image: an SQLite file in the user's cache folder."""

    def __init__(self, folder: Path | None = None) -> None:
        folder = cache_path("features") if folder is None else folder
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "features.sqlite"
        try:
            self._base = sqlite3.connect(self._path, timeout=60)
            self._base.execute(
                "create table if not exists features (key text primary key, height int, width int, value blob)"
            )
        except sqlite3.Error as error:
            raise InputError(
                f"{printable(self._path)} cannot be used ({error}); delete it or give --no_cache"
            ) from None

    def get(self, keys: Sequence[str]) -> dict[str, Kept]:
        """Returns what is kept of these keys."""
        marks = ",".join("?" * len(keys))
        rows = self._base.execute(f"select * from features where key in ({marks})", keys)
        return {
            key: Kept((height, width), np.frombuffer(value, np.float32)) for key, height, width, value in rows
        }

    def put(self, found: Mapping[str, Kept]) -> None:
        """Keeps features."""
        rows = [(key, *kept.size, kept.features.tobytes()) for key, kept in found.items()]
        with self._base:
            self._base.executemany("insert or replace into features values (?, ?, ?, ?)", rows)

    def close(self) -> None:
        self._base.close()


class Features(NamedTuple):
    """Features of a set, a memory-mapped float32 array [N, width], and the size of its images: height and width."""

    values: np.ndarray
    size: tuple[int, int]


def compute(
    images: ImageSet, network: Network, cache: FeatureCache | None = None, side: int | None = None
) -> Features:
    """Returns the features of a set; the file that they are in ends with the process.

    With `side` each image is first cut to a square of that side, as `crop_to` does; else all must have one size, or
    InputError names two that differ. One batch of images is in memory at a time.
    """
    file = tempfile.TemporaryFile()  # noqa: SIM115 - the array keeps it open
    made = np.memmap(file, np.float32, "w+", shape=(len(images), network.width))
    identity = f"{network.identity} {'own size' if side is None else f'cropped to {side}'}"
    first: tuple[str, tuple[int, int]] | None = None
    started = told = time.monotonic()
    fresh = 0
    with ThreadPoolExecutor(_READERS) as pool:
        for start in range(0, len(images), BATCH):
            items = images.items[start : start + BATCH]
            keys = [f"{identity} {key}" for key in pool.map(_key_of, items)]
            known: dict[str, Kept] = {} if cache is None else cache.get(keys)
            missing = {key: item for key, item in zip(keys, items, strict=True) if key not in known}
            if missing:
                found = _read(missing, network, side, pool)
                known, fresh = known | found, fresh + len(found)
                if cache is not None:
                    cache.put(found)
            for item, key in zip(items, keys, strict=True):
                first = first or (item.name, known[key].size)
                _same_size(images.name, first, (item.name, known[key].size))
            made[start : start + len(items)] = [known[key].features for key in keys]
            if time.monotonic() - told > NEWS_SECONDS:
                told, done = time.monotonic(), start + len(items)
                left = in_words((told - started) / done * (len(images) - done))
                logger.info(
                    "%s: %d of %d images read, %s left", printable(images.name), done, len(images), left
                )
    logger.info(
        "%s: %d images by %s in %.1f s, %d from the cache",
        printable(images.name), len(images), network.name, time.monotonic() - started, len(images) - fresh,
    )  # fmt: skip
    return Features(made, first[1] if first else (0, 0))


def _key_of(item: Item) -> str:
    return item.key()


def _read(
    missing: Mapping[str, Item], network: Network, side: int | None, pool: ThreadPoolExecutor
) -> dict[str, Kept]:
    """Returns the features of the images of these keys."""

    def prepare(item: Item) -> tuple[tuple[int, int], Tensor]:
        pixels = item.pixels()
        pixels = pixels if side is None else crop_to(pixels, side)
        return (pixels.shape[0], pixels.shape[1]), network.prepare(pixels)

    sizes, inputs = zip(*pool.map(prepare, missing.values()), strict=True)
    with torch.inference_mode():
        rows = network.features(torch.stack(inputs)).float().cpu().numpy()
    return {key: Kept(size, row) for key, size, row in zip(missing, sizes, rows, strict=True)}


def _same_size(name: str, first: tuple[str, tuple[int, int]], other: tuple[str, tuple[int, int]]) -> None:
    (a, (height, width)), (b, (tall, wide)) = first, other
    need(
        (height, width) == (tall, wide),
        f"{printable(name)}: {printable(a)} is {width}x{height} and {printable(b)} {wide}x{tall}; "
        "give --size 512, to cut all images to squares of one size",
    )
