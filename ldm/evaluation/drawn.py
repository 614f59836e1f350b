"""Images of a list of prompts, the share that is right, and sheets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm.evaluation.experiment import make_run, write_rows
from ldm.evaluation.images import folder_set

Make = Callable[[list[str]], int]  # runs txt2img's options


def draw(
    folder: Path, rows: Sequence[Mapping[str, Any]], options: Sequence[str], make: Make
) -> np.ndarray | int:
    """Draws an image of each row of a job's fields into a folder, with txt2img's `options`, or continues there.

    Returns the images, uint8 [N, H, W, 3], or an exit code of `make` that is not 0.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    prompts = folder.with_suffix(".jsonl")
    write_rows(prompts, rows)
    return make_run(folder, prompts, options, make) or images_of(folder)


def images_of(folder: Path, most: int | None = None) -> np.ndarray:
    """Returns the images of a folder, of one size, in the order of their names: all, or the first ones."""
    return np.stack([item.pixels() for item in folder_set(folder).items[:most]])


def share(marks: Sequence[bool]) -> float:
    """Returns the share of what is right."""
    return sum(marks) / len(marks)


def write_sheet(path: Path, rows: Sequence[Sequence[np.ndarray] | np.ndarray]) -> Path:
    """Writes rows of images, all of one size, as one image; returns the file."""
    Image.fromarray(np.concatenate([np.concatenate(list(row), axis=1) for row in rows])).save(path)
    return path
