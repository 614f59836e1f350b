"""A run whose prompts arrive while it goes on: each line is made when it comes, by a model that stays in memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

from ldm.runs.options import Request, RunOptions
from ldm.runs.prepare import Planner, Prepared, plan_request
from ldm.runs.progress import Report
from ldm.runs.run import run
from ldm.runs.run_folder import NoSuchRun
from ldm.seeds import counted
from ldm.util import InputError

logger = logging.getLogger("ldm")


def reads_all(options: RunOptions, request: Request) -> str:
    """Returns the option that needs the whole list before the first image is made; empty if there is none."""
    needs = {
        "--seed_mode batch": request.job.seed_mode == "batch",
        "--sweep": bool(request.sweep),
        "--fixed_code": options.fixed_code,
    }
    return next((name for name, needed in needs.items() if needed), "")


def serve(
    options: RunOptions,
    request: Request,
    lines: Iterable[bytes],
    planned: Callable[[Planner], Prepared],
    report: Report,
) -> int:
    """Makes the images of each line as a run of its own; returns the highest exit code of the lines.

    Files are numbered and seeds counted on from line to line, as in one run of all lines. A line that cannot be made
    is one error, with its number, and the next one follows. `planned` makes a run of a plan.
    """
    options, made, worst = replace(options, skip_grid=True), 0, 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            one = replace(request, job=counted(request.job, made), given=line, first_line=number)
            prepared = replace(planned(partial(plan_request, options, one)), options=options)
            made += len(prepared.plan)
            code = _run(prepared, report)
        except InputError as error:
            logger.error("error: %s", error)
            code = 1
        worst = max(worst, code)
        if code >= 128:  # a signal
            break
    return worst


def _run(prepared: Prepared, report: Report) -> int:
    """Makes one line's images; with --resume those that are missing, or all if the line is new in this folder."""
    own = Report(report.events)
    try:
        try:
            return run(prepared, own)
        except NoSuchRun:
            return run(replace(prepared, options=replace(prepared.options, resume=False)), own)
    finally:
        report.saved, report.failed = report.saved + own.saved, report.failed + own.failed
