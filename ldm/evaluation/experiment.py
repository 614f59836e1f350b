"""An evaluation's folder: its prompts, and a run of images for each point, a combination of settings.

FOLDER/evaluation.json      the points, the command and the presets of scoring
FOLDER/questions.jsonl      the prompts, and what is known of them
FOLDER/VARIANT/scale=5/     a run, as txt2img.py makes it: image i is that of prompt i, with the seed --seed + i
FOLDER/results.jsonl, results.csv, results.md, curve.png, curve.svg
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import shlex
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ldm.evaluation.prompts import Question, digest, read_questions, written
from ldm.fields import FIELDS
from ldm.files import read_side_file, written_whole
from ldm.prompts.expand import parse_sweep
from ldm.util import InputError, need, printable

logger = logging.getLogger("ldm")

DESCRIPTION, QUESTIONS, SECONDS = "evaluation.json", "questions.jsonl", "seconds.json"
_NAME = re.compile(r"[^\w.,=+ -]+")


@dataclass(frozen=True)
class Variant:
    """A named set of txt2img's options: a checkpoint, a LoRA, a precision; its points make one curve."""

    name: str
    options: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Variant:
        """Parses `NAME: OPTIONS`, such as "v1-5: --ckpt v1-5.ckpt"; the name may be left out."""
        name, colon, options = text.partition(": ")
        if not colon or text.lstrip().startswith("-"):
            name, options = "", text
        try:
            words = shlex.split(options)
        except ValueError as error:
            raise InputError(f"--variant {printable(text)[:80]}: {error}; close its quotes") from None
        need(
            bool(words),
            f'--variant {printable(text)[:80]} has no options; write one such as "v1-5: --ckpt v1-5.ckpt"',
        )
        return cls(folder_name(name or " ".join(word.lstrip("-") for word in words)), tuple(words))


@dataclass(frozen=True)
class Point:
    """One run of an evaluation: a variant with settings of sampling, by the names of fields, and its folder."""

    variant: str
    settings: Mapping[str, Any]
    folder: str
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Evaluation:
    """The content of an evaluation's folder. `scoring` has the options of `score` that its preset sets."""

    points: tuple[Point, ...]
    prompts: int
    prompts_sha256: str
    command: str
    scoring: Mapping[str, Any] = field(default_factory=dict[str, Any])


def folder_name(text: str) -> str:
    """Returns text as the name of a folder, without signs that file systems or shells read."""
    return _NAME.sub("-", text).strip(" .-")[:100] or "variant"


def plan_points(variants: Sequence[Variant], sweep: Sequence[str]) -> list[Point]:
    """Returns every variant with every combination of the sweep's values. Raises InputError for unknown settings."""
    combinations: list[dict[str, Any]] = list(parse_sweep(sweep).overrides()) if sweep else [{}]
    names = [variant.name for variant in variants]
    need(len(set(names)) == len(names), 'two variants have the same name; write --variant "NAME: OPTIONS"')
    option = {row.name: row.option for row in FIELDS}
    for name in combinations[0]:
        need(
            bool(option.get(name)) and name not in ("prompt", "seed"),
            f"--sweep {name} cannot be a setting of an evaluation",
        )
    return [
        Point(variant.name, values, _folder(variant.name, values),
              (*variant.options, *(f"--{option[name]}={_text(value)}" for name, value in values.items())))
        for variant, values in itertools.product(variants, combinations)
    ]  # fmt: skip


def _folder(variant: str, values: Mapping[str, Any]) -> str:
    settings = ",".join(f"{name}={_text(value)}" for name, value in values.items())
    return f"{variant}/{folder_name(settings)}" if settings else variant


def _text(value: Any) -> str:
    """Returns a value of a setting as an option takes it, such as 7.5 and 8."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def set_up(
    folder: Path,
    questions: Sequence[Question],
    points: Sequence[Point],
    command: str,
    scoring: Mapping[str, Any],
) -> Evaluation:
    """Writes an evaluation's description, or adds points to the one that exists.

    Raises InputError if the folder is that of other prompts.
    """
    folder.mkdir(parents=True, exist_ok=True)
    old = read_evaluation(folder) if (folder / DESCRIPTION).exists() else None
    sha256 = digest(questions)
    need(
        old is None or old.prompts_sha256 == sha256,
        f"{printable(folder)} is an evaluation with {old.prompts if old else 0} other prompts; give another "
        "--outdir, or the same prompts, --count and --subset_seed",
    )  # fmt: skip
    kept = [
        point for point in (old.points if old else ()) if point.folder not in {new.folder for new in points}
    ]
    made = Evaluation(
        (*kept, *points), len(questions), sha256, command, scoring or (old.scoring if old else {})
    )
    with written_whole(folder / QUESTIONS, overwrite=True) as part:
        part.write_text(written(questions), encoding="utf-8", errors="surrogatepass")
    with written_whole(folder / DESCRIPTION, overwrite=True) as part:
        part.write_text(json.dumps(asdict(made), indent=1) + "\n", encoding="utf-8")
    return made


def read_evaluation(folder: Path) -> Evaluation:
    """Reads an evaluation's description; InputError, of one line, if it is damaged."""
    path = folder / DESCRIPTION
    try:
        tree: dict[str, Any] = json.loads(read_side_file(path))
        listed: list[dict[str, Any]] = tree.pop("points")
        for point in listed:
            point["options"] = tuple(point["options"])
        points = [Point(**point) for point in listed]
        return Evaluation(tuple(points), **tree)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{printable(path)} is damaged: {printable(error)[:100]}; run `evaluate.py run` again"
        ) from None


def questions_of(folder: Path) -> list[Question]:
    """Returns the questions of an evaluation, or none if the folder holds none."""
    return read_questions(folder / QUESTIONS) if (folder / QUESTIONS).exists() else []


def check_points(points: Sequence[Point], check: Callable[[list[str]], None]) -> None:
    """Calls `check`, which raises InputError for faulty options of txt2img.py, with those of every point."""
    for point in points:
        try:
            check([*point.options])
        except InputError as error:
            raise InputError(f"{printable(point.folder)}: {error}") from None


def make_points(
    folder: Path, points: Sequence[Point], make: Callable[[list[str]], int], timed: bool = False
) -> int:
    """Makes the images of each point with `make`, which runs txt2img.py's options; returns the first exit code not 0.

    A point that is complete is left as it is, and one that was interrupted continues. Of a `timed` one `seconds_of`
    then gives the time.
    """
    prompts, questions = folder / "prompts.jsonl", questions_of(folder)
    write_rows(prompts, [{"prompt": question.prompt} for question in questions])
    for number, point in enumerate(points, 1):
        logger.info("point %d of %d: %s", number, len(points), printable(point.folder))
        outdir = folder / point.folder
        make_all = partial(make_run, outdir, prompts, point.options, make)
        missing = _count(outdir) < len(questions)
        if code := _timed(outdir, point.options, make, make_all) if timed and missing else make_all():
            return code
    return 0


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes a list of prompts: a JSON object of a job's fields on each line."""
    with written_whole(path, overwrite=True) as part:
        part.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_run(outdir: Path, prompts: Path, options: Sequence[str], make: Callable[[list[str]], int]) -> int:
    """Makes an image of each line of the list `prompts`, or continues a run; see `make_points`."""
    words = [*options, "--from-file", str(prompts), "--prompt_format", "jsonl", "--n_iter", "1"]
    words += ["--outdir", str(outdir), "--skip_grid"]
    words += ["--resume"] if any(outdir.glob("run-*.json")) else []
    try:
        return make(words)
    except InputError as error:
        cure = str(error).replace("drop --resume to start a new run", "give another --outdir")
        raise InputError(f"{printable(outdir.name)}: {cure.removeprefix('--resume: ')}") from None


def _timed(
    outdir: Path, options: Sequence[str], make: Callable[[list[str]], int], make_all: Callable[[], int]
) -> int:
    """Makes the images of a point, and notes their number and seconds; loading the model is not counted."""
    with tempfile.TemporaryDirectory() as scratch:
        one = ["--prompt", "", "--steps", "2", "--n_iter", "1", "--n_samples", "1", "--outdir", scratch]
        if code := make([*options, *one, "--skip_grid"]):
            return code
    before, started = _count(outdir), sum(os.times()[:4])
    code = make_all()
    taken, made = sum(os.times()[:4]) - started, _count(outdir) - before
    if made:
        images, seconds = _known_times(outdir)
        with written_whole(outdir / SECONDS, overwrite=True) as part:
            part.write_text(json.dumps({"images": images + made, "seconds": seconds + taken}) + "\n")
    return code


def _count(outdir: Path) -> int:
    return sum(1 for _ in outdir.glob("samples/*.png"))


def _known_times(outdir: Path) -> tuple[int, float]:
    path = outdir / SECONDS
    found: dict[str, Any] = (
        json.loads(read_side_file(path)) if path.exists() else {"images": 0, "seconds": 0.0}
    )
    return int(found["images"]), float(found["seconds"])


def seconds_of(outdir: Path) -> float | None:
    """Returns the CPU seconds of an image of a point, of all threads, if its images were timed."""
    images, seconds = _known_times(outdir)
    return seconds / images if images else None
