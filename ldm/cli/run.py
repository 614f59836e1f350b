"""The scripts that generate images: one run, with its events."""

from __future__ import annotations

import argparse
import logging
import secrets
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from ldm.cli.app import outcome
from ldm.cli.values import check_options, options_of, request_of
from ldm.prompts.arriving import PATIENCE, ArrivingLines, arriving_lines
from ldm.prompts.dialects import is_whole
from ldm.runs.model_cache import ModelCache
from ldm.runs.models import check_additions
from ldm.runs.options import Request, RunOptions
from ldm.runs.prepare import log_steps, plan_request, prepare, settle
from ldm.runs.processes import is_one_of_several, silence_other_ranks, starts_all
from ldm.runs.progress import Events, Report
from ldm.runs.run import run as make_images
from ldm.runs.run_folder import last_seed
from ldm.runs.worker import reads_all, serve
from ldm.util import need

logger = logging.getLogger("ldm")

RANDOM = -1  # the value of --seed for a random one


def run(opt: argparse.Namespace, cache: ModelCache | None = None) -> int:
    """Generates images from text and images; returns the exit code. With --json the last event is always `done`.

    `cache` holds the model for the next run in this process.
    """
    return reported(opt.json, opt.debug, lambda report: _run(opt, report, cache))


def reported(json: bool, debug: bool, task: Callable[[Report], int]) -> int:
    """Returns the exit code of a task; with `json` its faults are events too, and the last event is `done`."""
    with Events(json) as events:
        report = Report(events)
        if not json:
            return task(report)
        code = 1
        try:
            code = outcome(lambda: task(report), debug)
        except SystemExit as left:  # interrupted twice
            code = left.code if isinstance(left.code, int) else 1
            raise
        finally:
            seconds = round(time.monotonic() - report.started, 3)
            made = {} if report.elsewhere else {"saved": report.saved, "failed": report.failed}
            events.emit("done", **made, seconds=seconds, code=code)
        return code


def _run(opt: argparse.Namespace, report: Report, cache: ModelCache | None) -> int:
    from ldm.cli.dry_run import show

    options, command = options_of(opt), opt.typed
    silence_other_ranks(options)
    if opt.seed == RANDOM:
        opt.seed = _random_seed(options)
        command = None if command is None else [*command, f"--seed={opt.seed}"]
    check_options(opt)
    check_additions(options)
    request = request_of(opt)
    reads_input = request.from_file == "-"
    if reads_input and not opt.dry_run and not is_one_of_several(options) and (lines := arriving_lines()):
        request = replace(request, given=_whole_list(lines, options, request))
        if request.given is None:
            return serve(options, request, lines, settle(options, cache), report)
    planner = partial(plan_request, options, request)
    prepared = prepare(options, planner, cache, reads_input)
    if opt.dry_run:
        log_steps(prepared.plan[0])
        return show(prepared, report.events)
    return make_images(prepared, report, command=command)


def _whole_list(lines: ArrivingLines, options: RunOptions, request: Request) -> bytes | None:
    """Returns all of standard input if the prompts are a list that is read before images are made, else None."""
    terminal, needs = sys.stdin.isatty(), reads_all(options, request)
    if terminal:
        when = f"all are drawn at the end, since {needs} needs them" if needs else "each is drawn as it comes"
        logger.info("reading prompts from this terminal, one a line: %s; Ctrl-D ends", when)
    given = lines.whole(None if needs else 0 if terminal else PATIENCE)
    if given is None and is_whole(lines.first, request.prompt_format):
        return lines.whole(None)
    return given


def _random_seed(options: RunOptions) -> int:
    """Returns a random seed, or with --resume that of the folder's newest run; started processes receive it too."""
    need(
        not is_one_of_several(options) or starts_all(options),
        "--seed random would be another seed in each process; give a number",
    )
    last = last_seed(Path(options.outdir)) if options.resume else None
    seed = secrets.randbits(32) if last is None else last  # every generator accepts 32 bits
    logger.info("seed %d (%s)", seed, "random" if last is None else "that of the run that continues")
    return seed
