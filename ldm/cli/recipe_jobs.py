"""The jobs that make the image of a recipe again."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli.changes import changed
from ldm.job import Job, lora_name, split_loras
from ldm.job_values import check_fields
from ldm.metadata.command import MAX_PLACE, count, place
from ldm.runs.checks import check_job, check_syntax
from ldm.runs.given_jobs import GivenJobs
from ldm.runs.options import RunOptions
from ldm.runs.starts import Canvases
from ldm.seeds import counted
from ldm.util import InputError, need

if TYPE_CHECKING:
    from ldm.checkpoints.adapters.lora_files import LoraFiles
    from ldm.metadata.read import Recipe
    from ldm.models.diffusion.noise import StreamPlace

logger = logging.getLogger("ldm")


def job_of(recipe: Recipe, options: Mapping[str, Any]) -> Job:
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


def jobs_up_to(recipe: Recipe, typed: Mapping[str, Any]) -> tuple[list[Job], int]:
    """Returns the jobs up to the recipe's, which differ in their noise only, and the recipe's index.

    The other jobs of a batch do not change an image; whether their noise differs decides how a batch is computed.
    """
    wanted = place(recipe, typed)
    need(
        wanted <= MAX_PLACE,
        f"it is image {wanted} of one stream of noise; at most {MAX_PLACE} can be drawn again",
    )
    job, numbers = recipe.job, range(count(recipe, typed))
    if job.seed_mode == "batch":
        return [replace(job, batch_index=i) for i in numbers], wanted
    return [counted(job, i - wanted) for i in numbers], wanted


def place_in_stream(recipe: Recipe) -> StreamPlace | None:
    """Returns the position of an image in the noise stream of its run, if it matters and is recorded."""
    if recipe.job.seed_mode == "image" or "Stream" not in recipe.extras:
        return None
    from ldm.models.diffusion.noise import StreamPlace

    try:
        return StreamPlace.parse(recipe.extras["Stream"])
    except ValueError as error:
        raise InputError(f"its place in the noise of its run cannot be used: {error}") from None


def plan_jobs(
    jobs: list[Job],
    stream: StreamPlace | None,
    options: RunOptions,
    config: Mapping[str, Any],
    find_lora: LoraFiles,
) -> GivenJobs:
    """Plans the jobs, in the size of their starting image."""
    canvases = Canvases(options.inpaint, config)
    init = jobs[0].init
    if init is not None:
        height, width, _ = canvases(init).pixels.shape
        jobs = [replace(job, width=width, height=height) for job in jobs]
    check_job(jobs[0], config, find_lora)
    return GivenJobs(jobs, options.n_samples if stream is None else len(jobs), canvases, stream)
