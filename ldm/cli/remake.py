"""Pictures made again from their own files: shown as a command, made, or made and compared."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.cli.inputs import need
from ldm.cli.kept import KeptModel
from ldm.cli.locate import locate
from ldm.cli.replay import (
    Options,
    arguments,
    changes_of,
    command,
    compare,
    count,
    describe_watermark,
    place,
)
from ldm.cli.report import outcome
from ldm.cli.run import run
from ldm.util import InputError, printable, temporary_folder

if TYPE_CHECKING:
    import numpy as np

    from ldm.images.foreign import Recipe

logger = logging.getLogger("ldm")

Parsers = Mapping[str, Callable[[], argparse.ArgumentParser]]

OUTDIR = "outputs/replay"
_OWN = ("files", "outdir", "show", "verify", "tolerance", "json", "dry_run", "quiet", "debug", "typed")
_FOR_RUNS = (
    "from_file",
    "prompt_format",
    "expand",
    "sweep",
    "indir",
    "n_iter",
    "n_rows",
    "resume",
    "gallery",
    "skip_grid",
    "skip_save",
)
_FOLDERS = ("lora_dir", "embedding_dir")


def add_replay_options(parser: argparse.ArgumentParser) -> None:
    """Which files, and what is done with them."""
    parser.conflict_handler = "resolve"  # what is of this name in a run is another thing
    parser.add_argument(
        "files", metavar="FILE", nargs="+", help="PNG, JPEG or WebP files that were generated"
    )
    group = parser.add_argument_group("making again")
    what = group.add_mutually_exclusive_group()
    what.add_argument(
        "--show",
        action="store_true",
        help="say how it was made, with which command it is made again; make nothing",
    )
    what.add_argument("--verify", action="store_true", help="compare what is made with the file")
    group.add_argument(
        "--tolerance",
        metavar="N",
        type=int,
        default=0,
        help="let --verify pass differences up to this, 0 to 255",
    )
    group.add_argument("--outdir", metavar="DIR", default=OUTDIR, help="folder for the pictures")


def replay(opt: argparse.Namespace, parsers: Parsers) -> int:
    """Every file in turn, with the `parsers` of the scripts: 0, 1 if some failed or differ, 2 if all were refused."""
    changes = changes_of({name: value for name, value in vars(opt).items() if name not in _OWN})
    for name in _FOR_RUNS:
        need(
            name not in changes,
            f"--{name.replace('_', '-')} is for whole runs; a picture is made again by itself",
        )
    need(opt.show or not (opt.json or opt.dry_run), "--json and --dry_run go with --show")
    need(0 <= opt.tolerance <= 255, f"--tolerance is {opt.tolerance}; give 0 to 255")
    codes: list[int] = []
    kept = KeptModel()
    for file in opt.files:
        codes.append(outcome(partial(_one, Path(file), opt, changes, parsers, kept), opt.debug))
        if codes[-1] >= 128:
            return codes[-1]
    return codes[0] if len(set(codes)) == 1 else 1


def _one(file: Path, opt: argparse.Namespace, changes: Options, parsers: Parsers, kept: KeptModel) -> int:
    """One file; a fault's line begins with its name."""
    from ldm.images.foreign import read_job

    shown = printable(file)
    try:
        recipe = _readable(read_job(str(file)))
        if opt.show:
            return _show(file, recipe, changes, opt.json)
        return _make(file, recipe, opt, changes, parsers, kept)
    except InputError as error:
        raise InputError(str(error) if str(error).startswith(shown) else f"{shown}: {error}") from error


def _readable(recipe: Recipe) -> Recipe:
    """`recipe`, with its prompts as plain text where another program read more in them than is done here."""
    from ldm.prompts.weights import parse_weights

    job = recipe.job
    if recipe.source == "ldm" or job.prompt_syntax == "plain":
        return recipe
    try:
        for prompt in (job.prompt, job.negative_prompt):
            parse_weights(prompt)
    except InputError as error:
        note = f"its prompts are read as plain text: {error}"
        return replace(recipe, job=replace(job, prompt_syntax="plain"), notes=(*recipe.notes, note))
    return recipe


def _show(file: Path, recipe: Recipe, changes: Options, as_json: bool) -> int:
    """Prints what a file says, without looking for anything but its watermark."""
    script, typed = arguments(recipe, changes)
    line = command(recipe, changes)
    samples, sample = count(recipe, changes), place(recipe, changes)
    watermark = _watermark(file, script)
    if as_json:
        fields = {
            "file": str(file),
            "source": recipe.source,
            "command": line,
            "script": script,
            "arguments": typed,
        }
        fields |= {"samples": samples, "sample": sample, "model": recipe.model}
        fields |= {"model_hash": recipe.model_hash, "notes": recipe.notes, "watermark": watermark}
        print(json.dumps(fields))
        return 0
    print(f"{printable(file)}: of {recipe.source}\n  {line}")
    others = [f"this makes {samples} pictures; sample {sample:05d} is this one"] if samples > 1 else []
    for note in (*others, *recipe.notes, watermark["found"]):
        print(f"  {note}")
    return 0


def _watermark(file: Path, script: str) -> dict[str, object]:
    from ldm.images.watermark import INPAINTING_TEXT, TEXT, detect

    text = INPAINTING_TEXT if script == "inpaint" else TEXT
    try:
        evidence = detect(_pixels(file), text)
    except InputError as error:
        return {"text": text, "found": str(error)}
    return {"text": text, "found": describe_watermark(evidence, text), **evidence._asdict()}


def _pixels(file: Path) -> np.ndarray:
    import numpy as np

    from ldm.images.source import read_picture

    return np.asarray(read_picture(str(file)).color)


def _make(
    file: Path,
    recipe: Recipe,
    opt: argparse.Namespace,
    changes: Options,
    parsers: Parsers,
    kept: KeptModel,
) -> int:
    """Makes the picture of a file again, and compares the two if that was asked for."""
    located = locate(recipe, file.parent, changes)
    need(not located.missing, "; ".join(located.missing))
    for note in located.notes:
        logger.warning("%s: %s", printable(file), note)
    for note in recipe.notes if recipe.source != "ldm" else ():
        logger.info("%s: %s", printable(file), note)
    found: Options = {
        name: value for name, value in {**changes, **located.changes}.items() if name not in _FOLDERS
    }
    rewritten = not changes.keys().isdisjoint(("prompt", "negative_prompt"))
    # else a picture of this toolkit has said which textual inversions its words are
    if "embedding_dir" in changes and (rewritten or (recipe.source != "ldm" and "embedding" not in found)):
        found["embedding_dir"] = changes["embedding_dir"]
    script, typed = arguments(recipe, found)
    parsed, unknown = parsers[script]().parse_known_args(typed)
    need(
        not unknown,
        f"scripts/{script}.py makes it again, which does not take {printable(' '.join(unknown[:1]))}",
    )
    parsed.quiet, parsed.debug = opt.quiet, opt.debug
    made = _run_aside(parsed, kept, Path(opt.outdir), place(recipe, changes), file.stem)
    if not isinstance(made, Path):
        return made
    logger.info("%s is made again in %s", printable(file), printable(made))
    return _compare(file, made, opt.tolerance) if opt.verify else 0


def _run_aside(
    parsed: argparse.Namespace, kept: KeptModel, folder: Path, wanted: int, stem: str
) -> Path | int:
    """Runs in a hidden folder and keeps one sample, as a new file of `folder`: its path, or the run's exit code."""
    folder.mkdir(parents=True, exist_ok=True)
    with temporary_folder(".replay-", folder) as hidden:
        parsed.outdir = str(hidden)
        code = run(parsed, kept, name_files=False)
        return code or _keep(hidden / "samples" / f"{wanted:05d}.png", folder, stem)


def _keep(sample: Path, folder: Path, stem: str) -> Path:
    """Gives a copy of a sample the first free name of STEM.png, STEM-1.png, ..."""
    from ldm.images.writer import publish

    data, number = sample.read_bytes(), 0
    while True:
        path = folder / (f"{stem}-{number}.png" if number else f"{stem}.png")
        try:
            publish(path, data)
        except FileExistsError:
            number += 1
        else:
            return path


def _compare(file: Path, made: Path, tolerance: int) -> int:
    try:
        difference = compare(_pixels(file), _pixels(made))
    except InputError as error:
        print(f"{printable(file)}: different: {error}")
        return 1
    print(f"{printable(file)}: {difference}")
    return 0 if difference.largest <= tolerance else 1
