"""One run, from a plan to files."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ldm.files import FULL_DISK
from ldm.runs.launch import start
from ldm.runs.make import make
from ldm.runs.memory import check_batches
from ldm.runs.messages import name_process
from ldm.runs.prepare import Prepared, log_steps
from ldm.runs.processes import join
from ldm.runs.progress import Report
from ldm.util import printable

logger = logging.getLogger("ldm")


def run(
    prepared: Prepared, report: Report, name_files: bool = True, command: Sequence[str] | None = None
) -> int:
    """Makes the images of a prepared run; returns the exit code.

    If several processes share the run, this one starts them with `command`, the arguments of this Python, and waits.
    With `name_files` the path of each file is logged.
    """
    options, plan = prepared.options, prepared.plan
    code = start(options, command, prepared.stdin_copy)
    if code is not None:
        report.elsewhere = True
        return code
    here = join(options, prepared.device)
    if here.world > 1:
        name_process(here.rank, here.world, options.quiet, options.debug)
        report.events.about["process"] = here.rank
    source = prepared.source(here)
    log_steps(plan[0])
    check_batches(options, plan, prepared.config, here.device, source.precision)
    try:
        return make(options, plan, source, report, name_files)
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        logger.debug("", exc_info=True)
        rest = " with --resume" if name_files and not options.skip_save else ""
        logger.error(
            "error: disk full in %s: %d of %d images saved; free space and run the same command%s",
            printable(options.outdir), report.existing + report.saved, len(plan), rest,
        )  # fmt: skip
        return 1
