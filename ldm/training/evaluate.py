"""Evaluates the bundled model: it generates captioned scenes, and an independent network classifies them."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from ldm.config import read_config
from ldm.data.captions import UNORDERED, caption, plain_caption
from ldm.data.scenes import Scene, scene_at
from ldm.job import Job
from ldm.pipeline import Pipeline, load_model
from ldm.places import find
from ldm.runtime.device import resolve_device, resolve_precision
from ldm.seeds import count_up
from ldm.training.quality import SceneReader, judge, load_reader, score

logger = logging.getLogger("ldm")
_Item = TypeVar("_Item")

Shares = dict[str, float]  # of each question, 0 to 1


@dataclass(frozen=True)
class Measurement:
    """The model to measure, the number of images, and the settings of sampling.

    `seed` is that of the first image and of the captions; half of the `count` images, `batch` at a time, are of pairs
    of solids that training held out. With `plain`, captions are canonical instead of varied.
    """

    config: str
    ckpt: str
    judge: str
    device: str
    precision: str
    sampler: str
    steps: int
    scale: float
    seed: int
    size: int
    count: int
    batch: int
    plain: bool


@dataclass(frozen=True)
class Captioned:
    """Scenes with the split of each, and the captions that describe them."""

    splits: list[str]
    scenes: list[Scene]
    prompts: list[str]

    @classmethod
    def draw(cls, count: int, seed: int, plain: bool = False) -> Captioned:
        """Returns `count` scenes, the second half of pairs of solids that training held out; `seed` is the captions'.

        With `plain` the captions are canonical instead of varied.
        """
        half = count // 2
        splits = ["fresh"] * (count - half) + ["heldout"] * half
        scenes = [scene_at(i, split) for i, split in enumerate(splits)]
        rng = np.random.default_rng(seed)
        return cls(splits, scenes, [plain_caption(s) if plain else caption(s, rng) for s in scenes])

    def marks(self, reader: SceneReader, images: np.ndarray) -> list[dict[str, bool]]:
        """Returns what is right in each image, uint8 [N, H, W, 3]; a caption may leave the order open."""
        free = [re.search(rf"\b({'|'.join(UNORDERED)})\b", prompt) is not None for prompt in self.prompts]
        return [
            score(verdict, scene, ordered=not any_order)
            for verdict, scene, any_order in zip(judge(reader, images), self.scenes, free, strict=True)
        ]


def evaluate(chosen: Measurement) -> tuple[np.ndarray, dict[str, tuple[int, Shares]]]:
    """Returns the images, uint8 [count, size, size, 3], and for each kind of scene its number and fractions correct.

    The kinds are "fresh" and "heldout". An image that cannot be generated counts as black.
    """
    device, reader = resolve_device(chosen.device), load_reader(find(chosen.judge))
    model = load_model(read_config(chosen.config), find(chosen.ckpt), device)
    captioned = Captioned.draw(chosen.count, chosen.seed, chosen.plain)
    pipeline = Pipeline(model, resolve_precision(chosen.precision, device))
    images = _generate(pipeline, chosen, captioned.prompts)
    marks = captioned.marks(reader, images)
    return images, {
        split: _shares([mark for mark, of in zip(marks, captioned.splits, strict=True) if of == split])
        for split in ("fresh", "heldout")
    }


def _generate(pipeline: Pipeline, chosen: Measurement, prompts: Sequence[str]) -> np.ndarray:
    jobs = [
        Job(prompt, seed=count_up(chosen.seed, i, "philox"), width=chosen.size, height=chosen.size,
            steps=chosen.steps, sampler=chosen.sampler, scale=chosen.scale, rng="philox")
        for i, prompt in enumerate(prompts)
    ]  # fmt: skip
    blank = np.zeros((chosen.size, chosen.size, 3), np.uint8)
    images: list[np.ndarray] = []
    for batch in _chunks(jobs, chosen.batch):
        images += [blank if made.pixels is None else made.pixels for made in pipeline.make(batch)]
        logger.info("%d of %d images drawn", len(images), len(jobs))
    return np.stack(images)


def _shares(marks: Sequence[dict[str, bool]]) -> tuple[int, Shares]:
    return len(marks), {name: sum(mark[name] for mark in marks) / len(marks) for name in marks[0]}


def _chunks(items: Sequence[_Item], size: int) -> Iterator[Sequence[_Item]]:
    """Yields the items in runs of at most `size`."""
    return (items[i : i + size] for i in range(0, len(items), size))


def save_sheet(images: np.ndarray, path: Path, columns: int = 8) -> None:
    """Writes the images in rows of `columns`, in their order; an incomplete last row is left out."""
    columns = min(columns, len(images))
    rows = [np.concatenate(row, axis=1) for row in _chunks(list(images), columns) if len(row) == columns]
    Image.fromarray(np.concatenate(rows)).save(path)
