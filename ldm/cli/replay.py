"""Recreates images from their files: prints the command, makes the image, or makes it and compares.

The content of a file is data: its job is run as it is. Only typed options are parsed.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm import __version__
from ldm.cli.app import outcome
from ldm.cli.changes import changed, texts_of
from ldm.cli.generate import check_options, options_of
from ldm.cli.locate import locate
from ldm.fields import check_fields, values_of_options
from ldm.files import temporary_folder
from ldm.images.compare import compare
from ldm.job import Job, lora_name, split_loras
from ldm.metadata.command import (
    IN_A_STREAM,
    MAX_BATCH,
    MAX_PLACE,
    arguments,
    batch_size,
    command,
    count,
    of_the_run,
    place,
    recorded_batch,
)
from ldm.runs.given_jobs import GivenJobs
from ldm.runs.jobs import check_job, check_syntax
from ldm.runs.model_cache import ModelCache
from ldm.runs.models import check_additions
from ldm.runs.options import RunOptions
from ldm.runs.progress import Events
from ldm.runs.run import Planner, Report, prepare, run
from ldm.runs.starts import Canvases
from ldm.util import InputError, need, printable

if TYPE_CHECKING:
    import numpy as np

    from ldm.checkpoints.adapters.lora_files import LoraFiles
    from ldm.images.watermark import Evidence
    from ldm.metadata.read import Recipe
    from ldm.models.diffusion.noise import StreamPlace

logger = logging.getLogger("ldm")

OUTDIR = "outputs/replay"
SURE = 1e-6  # below this probability, a watermark is not explained by chance
UNSURE = 1e-2  # above it, chance is a good explanation
_OWN = ("files", "outdir", "show", "verify", "tolerance", "json", "dry_run", "quiet", "debug", "typed")
_FOR_RUNS = {
    "from_file": "--from-file",
    **{
        name: f"--{name}"
        for name in (
            "prompt_format", "expand", "sweep", "indir", "n_iter", "n_rows", "resume", "gallery", "skip_grid",
            "skip_save", "keep_going", "images_per_prompt",
        )
    },
}  # fmt: skip


def add_replay_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options for files and actions. Options of whole runs, which the parser has already, are hidden."""
    for action in parser._actions:
        action.help = argparse.SUPPRESS if action.dest in _FOR_RUNS else action.help
    parser.conflict_handler = "resolve"  # an option of this name in a run has another meaning
    parser.add_argument(
        "files", metavar="FILE", nargs="+", help="PNG, JPEG or WebP files that were generated"
    )
    group = parser.add_argument_group("replay")
    what = group.add_mutually_exclusive_group()
    what.add_argument(
        "--show",
        action="store_true",
        help="print how it was made and the command for it; make nothing",
    )
    what.add_argument("--verify", action="store_true", help="compare the new image with the file")
    group.add_argument(
        "--tolerance",
        metavar="N",
        type=int,
        default=0,
        help="let --verify pass differences up to this, 0 to 255",
    )
    group.add_argument(
        "--n_samples",
        metavar="N",
        default=argparse.SUPPRESS,
        help="size of the batch that an image is made in (default: as in its file)",
    )
    group.add_argument("--outdir", metavar="DIR", default=OUTDIR, help="folder for the images")


def replay(opt: argparse.Namespace, usual: Mapping[str, Any]) -> int:
    """Replays every file in turn; returns 0, or 1 if some failed or differ, 2 if all were refused.

    `opt` holds the typed options, and `usual` the default options of a run.
    """
    typed = {name: value for name, value in vars(opt).items() if name not in _OWN}
    for name, option in _FOR_RUNS.items():
        need(name not in typed, f"replay.py does not take {option} (it makes one image at a time)")
    need(opt.show or not (opt.json or opt.dry_run), "--json and --dry_run go with --show")
    need(0 <= opt.tolerance <= 255, f"--tolerance is {opt.tolerance}; give 0 to 255")
    codes: list[int] = []
    cache = ModelCache()
    for file in opt.files:
        codes.append(outcome(partial(_one, Path(file), opt, typed, usual, cache), opt.debug))
        if codes[-1] >= 128:
            return codes[-1]
    return codes[0] if len(set(codes)) == 1 else 1


def _one(
    file: Path, opt: argparse.Namespace, typed: Mapping[str, Any], usual: Mapping[str, Any], cache: ModelCache
) -> int:
    """Replays one file; a fault's line begins with its name."""
    from ldm.metadata.read import read_job

    shown = printable(file)
    try:
        recipe = _readable(read_job(str(file)))
        if opt.show:
            return _show(file, recipe, typed, opt.json)
        return _make(file, recipe, opt, typed, usual, cache)
    except InputError as error:
        raise InputError(str(error) if str(error).startswith(shown) else f"{shown}: {error}") from error


def _readable(recipe: Recipe) -> Recipe:
    """Returns `recipe` with prompts as plain text where another program parsed notations not supported here."""
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


def _show(file: Path, recipe: Recipe, typed: Mapping[str, Any], as_json: bool) -> int:
    """Prints the content of a file, without searching for anything but its watermark."""
    recipe = replace(recipe, job=changed(recipe.job, typed))
    changes = texts_of({name: value for name, value in typed.items() if not values_of_options({name: value})})
    script, words = arguments(recipe, changes)
    line = command(recipe, changes)
    samples, sample = count(recipe, changes), place(recipe, changes)
    watermark = _watermark(file, script)
    notes = [*_batch_notes(recipe, changes), *_command_notes(recipe), *recipe.notes]
    if as_json:
        fields = {
            "file": str(file),
            "source": recipe.source,
            "command": line,
            "script": script,
            "arguments": words,
        }
        fields |= {"samples": samples, "sample": sample, "model": recipe.model}
        fields |= {"model_hash": recipe.model_hash, "notes": notes, "watermark": watermark}
        print(json.dumps(fields))
        return 0
    print(f"{printable(file)}: made by {_maker(recipe)}\n  {line}")
    others = [f"this makes {samples} images; sample {sample:05d} is this one"] if samples > 1 else []
    for note in (*others, *notes, watermark["found"]):
        print(f"  {note}")
    return 0


def _command_notes(recipe: Recipe) -> list[str]:
    """Returns notes on why the command alone may not make the same image."""
    if recipe.job.seed_mode == "image" or "Stream" not in recipe.extras:
        return _stream_notes(recipe)
    return [IN_A_STREAM]


def _maker(recipe: Recipe) -> str:
    if recipe.source != "ldm":
        return recipe.source
    version = printable(recipe.extras.get("Version", "").removeprefix("ldm "))[:20]
    return f"this toolkit ({version or __version__})"


def _batch_notes(recipe: Recipe, changes: Mapping[str, Any]) -> list[str]:
    """Returns notes on a recorded batch that cannot be repeated."""
    size = recorded_batch(recipe)
    if size <= MAX_BATCH or "n_samples" in changes:
        return []
    return [f"its file asks for a batch of {size}; it is made alone, so the last bits can differ"]


def _stream_notes(recipe: Recipe) -> list[str]:
    """Returns notes on the unknown rest of a run whose one stream of noise an image was part of."""
    if recipe.job.seed_mode == "image" or recipe.source != "ldm" or "Stream" in recipe.extras:
        return []
    return [
        "its file does not say what its run drew before it from the one stream of --seed_mode batch; it is the "
        "same image only if all images of the run had its size and settings and came in full batches"
    ]


def _place_in_stream(recipe: Recipe) -> StreamPlace | None:
    """Returns the position of an image in the noise stream of its run, if it matters and is recorded."""
    if recipe.job.seed_mode == "image" or "Stream" not in recipe.extras:
        return None
    from ldm.models.diffusion.noise import StreamPlace

    try:
        return StreamPlace.parse(recipe.extras["Stream"])
    except ValueError as error:
        raise InputError(f"its place in the noise of its run cannot be used: {error}") from None


def _watermark(file: Path, script: str) -> dict[str, object]:
    from ldm.images.watermark import INPAINTING_TEXT, TEXT, detect

    text = INPAINTING_TEXT if script == "inpaint" else TEXT
    try:
        evidence = detect(_pixels(file), text)
    except InputError as error:
        return {"text": text, "found": str(error)}
    return {"text": text, "found": describe_watermark(evidence, text), **evidence._asdict()}


def describe_watermark(evidence: Evidence, text: str) -> str:
    """Describes the result of a search for the watermark `text` in one line."""
    if evidence.chance < SURE:
        verdict = "is there"
    elif evidence.chance > UNSURE:
        verdict = "is not to be seen"
    else:
        verdict = "may be there"
    return (
        f"the watermark {printable(text)} {verdict}: {evidence.agreeing_bits} of {evidence.total_bits} bits agree, "
        f"which chance brings about in 1 of {1 / evidence.chance:.3g} images"
    )


def _pixels(file: Path) -> np.ndarray:
    import numpy as np

    from ldm.images.source import read_picture

    return np.asarray(read_picture(str(file)).color)


def _make(
    file: Path,
    recipe: Recipe,
    opt: argparse.Namespace,
    typed: Mapping[str, Any],
    usual: Mapping[str, Any],
    cache: ModelCache,
) -> int:
    """Recreates the image of a file, and compares the two if that was requested."""
    from ldm.metadata.read_own import start_note

    located = locate(recipe, file.parent, typed)
    need(not located.missing, "; ".join(located.missing))
    for note in located.notes + _batch_notes(recipe, typed) + _stream_notes(recipe):
        logger.warning("%s: %s", printable(file), note)
    for note in recipe.notes:
        if recipe.source != "ldm":
            logger.info("%s: %s", printable(file), note)
        elif note != start_note(recipe.job):  # that image was found
            logger.warning("%s: %s", printable(file), note)
    recipe = replace(recipe, job=_job(recipe, {**typed, **located.changes}))
    job, stream = recipe.job, _place_in_stream(recipe)
    need(
        stream is None or "n_samples" not in typed,
        "--n_samples does not go with an image of --seed_mode batch, whose noise depends on its batch",
    )
    jobs, wanted = _jobs(recipe, typed) if stream is None else ([job] * stream.size, stream.entry)
    run_opt = argparse.Namespace(
        **{**usual, **of_the_run(recipe), **typed, **located.changes, **_of_replay(opt, job)}
    )
    run_opt.n_iter, run_opt.n_samples = 1, batch_size(recipe, typed)
    rewritten = not typed.keys().isdisjoint(("prompt", "negative_prompt"))
    # else the textual inversions are recorded by an image of this toolkit
    if not (rewritten or (recipe.source != "ldm" and not run_opt.embedding)):
        run_opt.embedding_dir = None
    check_options(run_opt)
    options = options_of(run_opt)
    check_additions(options)
    planner = partial(_planner, jobs, stream, options)
    made = _run_aside(options, planner, cache, Path(opt.outdir), wanted, file.stem)
    if not isinstance(made, Path):
        return made
    logger.info("%s: regenerated as %s", printable(file), printable(made))
    return _compare(file, made, opt.tolerance) if opt.verify else 0


def _job(recipe: Recipe, options: Mapping[str, Any]) -> Job:
    """Returns the job to run; its LoRAs are named after the files that were found or typed."""
    job = changed(recipe.job, options)
    if "lora" in options:
        loras = tuple((lora_name(Path(path).name), *weights) for path, *weights in options["lora"])
        job = replace(job, loras=loras)
    if "prompt" in options and split_loras(job.prompt)[1]:
        logger.warning("<lora:...> in --prompt is text like any other here; give the file with --lora")
    check_fields(job)
    if job.prompt_syntax == "a1111":
        check_syntax(job)
    return job


def _jobs(recipe: Recipe, typed: Mapping[str, Any]) -> tuple[list[Job], int]:
    """Returns the jobs up to the recipe's, which are all equal, and the recipe's index.

    The other jobs of a batch do not change an image.
    """
    wanted = place(recipe, typed)
    need(
        wanted <= MAX_PLACE,
        f"it is image {wanted} of one stream of noise; at most {MAX_PLACE} can be drawn again",
    )
    jobs = [recipe.job] * count(recipe, typed)
    if recipe.job.seed_mode == "batch":
        jobs = [replace(job, batch_index=i) for i, job in enumerate(jobs)]
    return jobs, wanted


def _of_replay(opt: argparse.Namespace, job: Job) -> dict[str, Any]:
    """Returns the options of a run that the job or this script determines."""
    inpaint = job.init is not None and bool(job.init.mask or job.init.alpha_mask)
    chosen = {"seed_mode": job.seed_mode, "inpaint": inpaint, "quiet": opt.quiet, "debug": opt.debug}
    return {**chosen, "skip_grid": True}


def _planner(
    jobs: list[Job],
    stream: StreamPlace | None,
    options: RunOptions,
    config: Mapping[str, Any],
    find_lora: LoraFiles,
) -> GivenJobs:
    """Plans the jobs, in the size of their starting image."""
    canvases = Canvases(mask_needed=options.inpaint)
    init = jobs[0].init
    if init is not None:
        height, width, _ = canvases(init).pixels.shape
        jobs = [replace(job, width=width, height=height) for job in jobs]
    check_job(jobs[0], config, find_lora)
    return GivenJobs(jobs, options.n_samples if stream is None else len(jobs), canvases, stream)


def _run_aside(
    options: RunOptions, planner: Planner, cache: ModelCache, folder: Path, wanted: int, stem: str
) -> Path | int:
    """Runs in a hidden folder and moves one sample to a new file of `folder`; returns its path, or the exit code."""
    folder.mkdir(parents=True, exist_ok=True)
    with temporary_folder(".replay-", folder) as hidden:
        prepared = prepare(replace(options, outdir=str(hidden)), planner, cache)
        code = run(prepared, Report(Events(False)), name_files=False)
        return code or _keep(hidden / "samples" / f"{wanted:05d}.png", folder, stem)


def _keep(sample: Path, folder: Path, stem: str) -> Path:
    """Copies a sample to the first free name of STEM.png, STEM-1.png, ..."""
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
