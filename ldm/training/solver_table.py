"""Compares solvers and schedules on the bundled model: right images, and distance to the ODE's solution, by calls.

The distance is the root mean square of the difference of latents from those of the probability flow ODE with the same
start noise, as 999 steps of `dpmpp_2m` give them. Solvers with fresh noise have other solutions: no distance.
"""

from __future__ import annotations

import csv
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch

from ldm.config import read_config
from ldm.files import written_whole
from ldm.job import Job
from ldm.models.diffusion.solvers.registry import SOLVERS
from ldm.pipeline import Pipeline, load_model
from ldm.pipeline.image import GeneratedImage
from ldm.places import find
from ldm.runtime.device import resolve_device, resolve_precision
from ldm.training.evaluate import Captioned
from ldm.training.quality import load_reader
from ldm.util import InputError, printable

logger = logging.getLogger("ldm")

CALLS = (10, 20, 6, 4, 30, 15, 8, 50, 100)  # of the model for an image, the most telling first
_LEFT_OUT = ("lcm", "tcd", "restart")  # made for other models; heun in so few steps
# those with more numbers of calls than 10 and 20, and with other schedules than their own
_MAIN = ("ddim", "euler_a", "dpmpp_2m", "unipc")
_SCHEDULES = ("karras", "trailing")
_MORE = (
    "original",
    "exponential",
    "sgm_uniform",
    "simple",
    "beta",
    "kl_optimal",
    "align_your_steps",
)  # of dpmpp_2m
_REFERENCE = Job("", sampler="dpmpp_2m", schedule="uniform", steps=999)
_COLUMNS: tuple[str, ...] = ("solver", "schedule", "calls", "steps", "right", "distance")


@dataclass(frozen=True)
class Cell:
    """A solver with a schedule and at most `calls` of the model; measured, `right` is a share, 0 to 1.

    `distance` is in units of the latents, whose standard deviation is 1; None with fresh noise.
    """

    solver: str
    schedule: str
    calls: int
    right: float = 0.0
    distance: float | None = None

    @property
    def steps(self) -> int:
        """The largest number of steps that needs no more calls."""
        row = SOLVERS[self.solver]
        steps = (self.calls - row.more + row.calls - 1) // row.calls
        return max(steps, 1)

    @property
    def key(self) -> tuple[str, str, int]:
        return self.solver, self.schedule, self.calls

    def row(self) -> dict[str, str]:
        """Returns its row of the CSV file."""
        distance = "" if self.distance is None else f"{self.distance:.4f}"
        values = (self.solver, self.schedule, self.calls, self.steps, f"{self.right:.3f}", distance)
        return dict(zip(_COLUMNS, map(str, values), strict=True))

    @classmethod
    def read(cls, row: Mapping[str, str]) -> Cell:
        """Returns the cell of a row of the CSV file."""
        distance = float(row["distance"]) if row["distance"] else None
        return cls(row["solver"], row["schedule"], int(row["calls"]), float(row["right"]), distance)


def grid() -> list[Cell]:
    """Returns what is measured, those of few calls first.

    Every solver has its own schedule at 10 and 20 calls, and the main ones other schedules too; these also have
    their own at the other numbers of calls.
    """
    own = {name: row.schedule for name, row in SOLVERS.items() if name not in _LEFT_OUT}
    others = [(name, schedule) for name in _MAIN for schedule in _SCHEDULES]
    others += [("dpmpp_2m", schedule) for schedule in _MORE]
    cells: list[Cell] = []
    for calls in CALLS:
        both = calls in (10, 20)
        cells += [Cell(name, own[name], calls) for name in (own if both else _MAIN)]
        cells += [Cell(name, schedule, calls) for name, schedule in others if both]
    return cells


def pairs(cells: Iterable[Cell]) -> list[tuple[str, str]]:
    """Returns each solver with each of its schedules, once."""
    return list(dict.fromkeys((cell.solver, cell.schedule) for cell in cells))


@dataclass(frozen=True)
class Comparison:
    """A comparison: the model, the reader of images, and the settings that all images share.

    `count` images are judged, and `compared` of them are compared with the solution.
    """

    config: str
    ckpt: str
    judge: str
    device: str
    scale: float
    seed: int
    count: int
    compared: int
    batch: int


def compare(chosen: Comparison, folder: Path, cells: Sequence[Cell]) -> list[Cell]:
    """Measures the cells that `folder`/solvers.csv does not have yet, and appends each; returns all that it has then.

    Raises `InputError` if that file was made with other settings.
    """
    done = _begun(chosen, folder)
    left = [cell for cell in cells if cell.key not in {one.key for one in done}]
    if not left:
        return done
    device, reader = resolve_device(chosen.device), load_reader(find(chosen.judge))
    model = load_model(read_config(chosen.config), find(chosen.ckpt), device)
    pipeline = Pipeline(model, resolve_precision("autocast", device))
    captioned = Captioned.draw(chosen.count, chosen.seed)

    def draw(job: Job, count: int) -> Iterator[GeneratedImage]:
        jobs = [
            replace(job, prompt=prompt, seed=chosen.seed + i, scale=chosen.scale, width=128, height=128)
            for i, prompt in enumerate(captioned.prompts[:count])
        ]
        for start in range(0, count, chosen.batch):
            yield from pipeline.make(jobs[start : start + chosen.batch])

    @cache
    def solution() -> np.ndarray:
        return _solution(folder / "solution.npy", lambda: draw(_REFERENCE, chosen.compared))

    begun, calls = time.monotonic(), 0
    for number, cell in enumerate(left):
        job = Job("", sampler=cell.solver, schedule=cell.schedule, steps=cell.steps)
        images = list(draw(job, chosen.count))
        marks = captioned.marks(reader, np.stack([_pixels(image) for image in images]))
        right = sum(mark["all"] for mark in marks) / len(marks)
        distance = None
        if not SOLVERS[cell.solver].draws:
            distance = float(np.sqrt(np.mean((_latents(images[: chosen.compared]) - solution()) ** 2)))
        cell = Cell(cell.solver, cell.schedule, cell.calls, right, distance)
        _append(folder / "solvers.csv", cell)
        done.append(cell)
        calls += cell.calls + 5  # an image costs about as much as 5 calls besides
        seconds = (time.monotonic() - begun) / calls * sum(one.calls + 5 for one in left[number + 1 :])
        logger.info(
            "%s/%s %d calls: %.1f %% right, distance %s; %d of %d, %.0f min left",
            cell.solver, cell.schedule, cell.calls, 100 * right,
            "-" if distance is None else f"{distance:.3f}", number + 1, len(left), seconds / 60,
        )  # fmt: skip
    return done


def _pixels(image: GeneratedImage) -> np.ndarray:
    return np.zeros((128, 128, 3), np.uint8) if image.pixels is None else image.pixels


def _latents(images: Iterable[GeneratedImage]) -> np.ndarray:
    """Returns the latents of images, [N, C, h, w]; raises `InputError` if one has none."""
    found = [image.latent for image in images]
    if any(latent is None for latent in found):
        raise InputError("the model gave an image that is not finite; its distance cannot be measured")
    return torch.stack([latent for latent in found if latent is not None]).numpy()


def _solution(path: Path, draw: Callable[[], Iterable[GeneratedImage]]) -> np.ndarray:
    """Returns the solution's latents [N, C, h, w]; `draw` makes them once, and `path` keeps them."""
    if not path.is_file():
        logger.info("solving in %d steps, to compare with", _REFERENCE.steps)
        latents = _latents(draw())
        with written_whole(path, overwrite=True) as part, part.open("wb") as file:
            np.save(file, latents)
    return np.load(path)


def _begun(chosen: Comparison, folder: Path) -> list[Cell]:
    """Returns the cells that `folder` has already, whose settings must be these; begins it if it is empty."""
    settings = json.dumps(vars(chosen), indent=1)
    noted = folder / "settings.json"
    if noted.is_file():
        if noted.read_text(encoding="utf-8") != settings:
            raise InputError(f"{printable(folder)} was begun with other settings; give another --outdir")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        noted.write_text(settings, encoding="utf-8")
    return read_cells(folder / "solvers.csv") if (folder / "solvers.csv").is_file() else []


def read_cells(path: Path) -> list[Cell]:
    """Returns the cells of a CSV file; raises `InputError` if it is not one of these tables."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [Cell.read(row) for row in csv.DictReader(file)]
    except (KeyError, ValueError, TypeError):
        raise InputError(f"{printable(path)} is not a table of solvers") from None


def _append(path: Path, cell: Cell) -> None:
    new = not path.is_file()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer: csv.DictWriter[str] = csv.DictWriter(file, _COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(cell.row())
