"""Makes the image of a file again, and compares the two."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli.explain import batch_notes, pixels_of, stream_notes
from ldm.cli.locate import locate
from ldm.cli.recipe_jobs import job_of, jobs_up_to, place_in_stream, plan_jobs
from ldm.cli.values import check_options, options_of
from ldm.files import temporary_folder
from ldm.images.compare import compare
from ldm.job import Job
from ldm.metadata.command import batch_size, of_the_run
from ldm.runs.model_cache import ModelCache
from ldm.runs.models import check_additions
from ldm.runs.options import RunOptions
from ldm.runs.prepare import Planner, prepare
from ldm.runs.progress import Events, Report
from ldm.runs.run import run
from ldm.util import InputError, need, printable

if TYPE_CHECKING:
    from ldm.metadata.read import Recipe

logger = logging.getLogger("ldm")


def recreate(
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
    for note in located.notes + batch_notes(recipe, typed) + stream_notes(recipe):
        logger.warning("%s: %s", printable(file), note)
    for note in recipe.notes:
        if recipe.source != "ldm":
            logger.info("%s: %s", printable(file), note)
        elif note != start_note(recipe.job):  # that image was found
            logger.warning("%s: %s", printable(file), note)
    recipe = replace(recipe, job=job_of(recipe, {**typed, **located.changes}))
    job, stream = recipe.job, place_in_stream(recipe)
    need(
        stream is None or "n_samples" not in typed,
        "--n_samples does not go with an image of --seed_mode batch, whose noise depends on its batch",
    )
    jobs, wanted = jobs_up_to(recipe, typed) if stream is None else ([job] * stream.size, stream.entry)
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
    planner = partial(plan_jobs, jobs, stream, options)
    made = _run_aside(options, planner, cache, Path(opt.outdir), wanted, file.stem)
    if not isinstance(made, Path):
        return made
    logger.info("%s: regenerated as %s", printable(file), printable(made))
    return _compare(file, made, opt.tolerance) if opt.verify else 0


def _of_replay(opt: argparse.Namespace, job: Job) -> dict[str, Any]:
    """Returns the options of a run that the job or this script determines."""
    inpaint = job.init is not None and bool(job.init.mask or job.init.alpha_mask)
    chosen = {"seed_mode": job.seed_mode, "inpaint": inpaint, "quiet": opt.quiet, "debug": opt.debug}
    return {**chosen, "skip_grid": True}


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
        difference = compare(pixels_of(file), pixels_of(made))
    except InputError as error:
        print(f"{printable(file)}: different: {error}")
        return 1
    print(f"{printable(file)}: {difference}")
    return 0 if difference.largest <= tolerance else 1
