"""A run whose images come from their seeds alone, without a model."""

from __future__ import annotations

from functools import partial

import numpy as np

from ldm.images.grid import count_pages
from ldm.images.writer import RunFolder
from ldm.job import Job
from ldm.pipeline import GeneratedImage
from ldm.runs.description import describe
from ldm.runs.existing import Present
from ldm.runs.options import RunOptions
from ldm.runs.output import Output
from ldm.runs.progress import Events
from ldm.runs.run_folder import open_run
from ldm.safety.screen import Screen

SIDE = 16


def output_options(**changes):
    return RunOptions(outdir="", **changes)


def pixels_of(job):
    return np.random.default_rng(job.seed).integers(0, 256, (SIDE, SIDE, 3), np.uint8)


def make_jobs(count, **fields):
    return [Job(f"prompt {i}", seed=i, width=SIDE, height=SIDE, **fields) for i in range(count)]


def in_batches(count, size):
    return [list(range(i, min(i + size, count))) for i in range(0, count, size)]


def run_without_model(
    folder, jobs, batches, resume=False, stop_after=None, json_events=False, screen=None, **changes
):
    """Runs without a model; returns how many batches it made, and its output."""
    options = output_options(**changes)
    columns, made = 3, 0
    pages = 0 if options.skip_grid else count_pages(((SIDE, SIDE) for _ in jobs), columns)
    with RunFolder(folder) as run_folder, Events(json_events) as events:
        hashes = {"checkpoint": lambda: "ab" * 32}
        content = describe(jobs, batches, {"precision": "full"})
        run = open_run(run_folder, content, len(jobs), {"grid": pages}, hashes, resume)
        try:
            extras = {"Model": "fake"}
            with Output(
                options,
                run_folder,
                run,
                present := Present(run, options.verify),
                columns,
                lambda rgb: rgb.copy(),
                screen or Screen(None),
                lambda job: extras,
                events,
            ) as output:
                for indices in batches:
                    if not (options.skip_save or present.lacks(indices)):
                        continue
                    pictures = [GeneratedImage(jobs[i], pixels_of(jobs[i]), {}) for i in indices]
                    output.add(indices, partial(list, pictures))
                    made += 1
                    if made == stop_after:
                        break
                output.finish()
        finally:
            run.close()
    return made, output, len(present.whole)
