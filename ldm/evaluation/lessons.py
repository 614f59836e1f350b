"""Measures a fine-tuned model against the bundled one: new things and usual ones, with equal prompts and seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm.data.captions import plain_caption
from ldm.data.lessons import HOLE, LESSONS, hole, question, shows
from ldm.evaluation.drawn import Make, draw, images_of, share, write_sheet
from ldm.places import find
from ldm.training.evaluate import Captioned
from ldm.training.quality import judge, load_reader, score

READER = Path("models/ldm/shapes/judge.pt")
_SIDES = ("before", "after")

Table = Mapping[str, Mapping[str, float]]  # side, then question: the share of images that are right


def measure(
    name: str, folder: Path, count: int, options: Sequence[str], trained: Sequence[str], make: Make
) -> Table | int:
    """Draws prompts of the new thing and of usual scenes, without and with the options `trained`.

    Returns the shares that are right of each `count`, or an exit code of `make` that is not 0. New colours and shapes
    are recognised by renderings (`ldm.data.lessons`), known ones by the bundled model's reader, as in `evaluate.py`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    usual = Captioned.draw(count, seed=1)
    rows = {"new": _rows(name, folder, count), "usual": [{"prompt": prompt} for prompt in usual.prompts]}
    reader, table = load_reader(find(READER)), dict[str, dict[str, float]]()
    for side, own in zip(_SIDES, ((), trained), strict=True):
        drawn: dict[str, np.ndarray] = {}
        for which in rows:
            images = draw(folder / side / which, rows[which], [*options, *own], make)
            if isinstance(images, int):
                return images
            drawn[which] = images
        marks = usual.marks(reader, drawn["usual"])
        table[side] = {_ASKED[name]: share(_right(name, drawn["new"]))}
        table[side] |= {f"usual prompts: {part}": share([mark[part] for mark in marks]) for part in marks[0]}
    return table


_ASKED = {
    "orange": "an orange solid is orange",
    "pyramid": "a pyramid is one",
    "totem": "a totem is the pair",
    HOLE: "the hole has what is asked for",
}


def _rows(name: str, folder: Path, count: int) -> list[dict[str, Any]]:
    """The prompts of the new thing, which no lesson shows; those of holes with their images and masks."""
    if name != HOLE:
        return [{"prompt": question(name, number)[1]} for number in range(count)]
    rows: list[dict[str, Any]] = []
    images = folder / "images"
    images.mkdir(exist_ok=True)
    for number in range(count):
        files = [images / f"{number:03}{ending}.png" for ending in ("", "-hole")]
        image, mask, target = hole(number)
        for file, pixels in zip(files, (image, mask), strict=True):
            Image.fromarray(pixels).save(file)
        start = {"image": str(files[0].absolute()), "mask": str(files[1].absolute())}
        rows.append({"prompt": plain_caption(target), "init": start, "strength": 1.0})  # from noise alone
    return rows


def _right(name: str, images: np.ndarray) -> list[bool]:
    if LESSONS.get(name) in ("colour", "shape"):
        return [shows(name, image, question(name, number)[0]) for number, image in enumerate(images)]
    verdicts = judge(load_reader(find(READER)), images)
    scenes = [hole(i)[2] if name == HOLE else question(name, i)[0] for i in range(len(images))]
    return [score(verdict, scene)["all"] for verdict, scene in zip(verdicts, scenes, strict=True)]


def as_markdown(table: Table) -> str:
    """Returns the table with a row for each question and columns before, after."""
    lines = ["| right | before | after |", "|---|---|---|"]
    for asked in table["before"]:
        lines.append(f"| {asked} | " + " | ".join(f"{table[side][asked]:.0%}" for side in _SIDES) + " |")
    return "\n".join(lines)


def write_pairs(folder: Path, columns: int = 8) -> Path:
    """Writes the first images of the new thing, a row before and a row after the training; returns the file."""
    return write_sheet(folder / "lesson.png", [images_of(folder / side / "new", columns) for side in _SIDES])
