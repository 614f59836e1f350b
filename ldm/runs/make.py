"""Makes and writes one process's share of a run."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING

from ldm.runs.batches import Halves, generate
from ldm.runs.checks import count_steps
from ldm.runs.claim import Claim
from ldm.runs.existing import Present
from ldm.runs.extras import extras_of
from ldm.runs.filters import make_mark
from ldm.runs.hints import write_hints
from ldm.runs.load import load, load_nothing
from ldm.runs.messages import REST
from ldm.runs.options import RunOptions
from ldm.runs.output import Output
from ldm.runs.plan import Plan
from ldm.runs.previews import Previews, wanted
from ldm.runs.progress import Interrupts, Progress, Report
from ldm.runs.sheets import write_sheets
from ldm.runs.source import Source
from ldm.util import InputError, printable

if TYPE_CHECKING:
    from ldm.pipeline import Pending, Pipeline

logger = logging.getLogger("ldm")


def make(options: RunOptions, plan: Plan, source: Source, report: Report, name_files: bool) -> int:
    """Makes and writes this process's share of a plan; returns the exit code."""
    from ldm.images.writer import RunFolder

    here, events = source.here, report.events
    with RunFolder(options.outdir) as folder, Interrupts() as interrupts:
        claim = Claim(options, folder, plan, source)
        # invalid requests are refused before the model is loaded, and existing images are not repeated
        present = Present(claim.take(), options.verify) if options.resume else None
        missing = [batch for batch in plan.wanted() if present is None or present.lacks(batch)]
        mark = make_mark(options)
        loaded = load(options, plan, source, claim, report.started) if missing else load_nothing()
        claimed = claim.take()
        present = present or Present(claimed, verify=False)
        report.existing = len(present.whole)
        batches = here.share(missing)
        here.barrier_then_detach()
        steps = sum(count_steps(plan[batch[0]]) for batch in batches)
        progress = Progress(sum(map(len, batches)), steps, options.quiet or here.rank > 0, events)
        extras = extras_of(options, plan, source, claimed.hashes, loaded.embeddings)
        hints = partial(write_hints, folder.path, source.canvases) if options.save_hints else None
        output = Output(
            options, folder, claimed, present, claim.columns, mark, loaded.screen, extras, events,
            here.device.type == "cpu", here.world > 1, name_files, hints,
        )  # fmt: skip
        events.emit(
            "start",
            folder=str(folder.path), run=str(claimed.path), images=len(plan), existing=len(present.whole),
        )  # fmt: skip

        def stopped() -> bool:
            failed = output.failed and not options.keep_going
            return bool(failed or interrupts.received or here.deserted)

        try:
            with contextlib.closing(claimed), contextlib.closing(progress), output:
                if (pipeline := loaded.pipeline) is not None:
                    halves = Halves(options, claimed, progress)
                    with contextlib.ExitStack() as beside:
                        previews = None
                        if wanted(options, loaded.screen):
                            small = options.preview_vae
                            shown = pipeline.colours if small is None else pipeline.small_decoder(small)
                            previews = Previews(options, shown, claimed.sample_path, events)
                            beside.enter_context(previews)
                        making = generate(
                            options, pipeline, plan, batches, progress, halves, stopped, previews
                        )
                        _write(making, pipeline, output, options.compile, interrupts)
                pages = bool(missing) or not claimed.has_pages()
                if output.finish(pages) and pages and not options.skip_save:
                    write_sheets(plan, claimed, mark, output.fail)
        finally:
            report.saved, report.failed = output.saved, output.failed
    where = printable(folder.path)
    if missing:
        _log_saved(output.saved, time.monotonic() - report.started, where)
    else:
        logger.info("nothing to do: all %d images exist in %s", len(plan), where)
    code = 128 + interrupts.received if interrupts.received else 1 if output.failed else 0
    if code and name_files and not options.skip_save and not output.complete and not here.supervised:
        logger.warning(REST)
    return code


def _write(
    batches: Iterable[tuple[list[int], list[Pending]]],
    pipeline: Pipeline,
    output: Output,
    compiles: bool,
    interrupts: Interrupts,
) -> None:
    """Passes batches to `output` as they are sampled."""
    try:
        for indices, pending in batches:
            output.add(indices, partial(pipeline.finish, pending))
    except InputError as error:  # a starting image was removed meanwhile
        output.give_up(error)
    except Exception as error:
        if not (compiles and interrupts.received):
            raise
        logger.debug("the signal reached the compiler too: %s", printable(error))


def _log_saved(saved: int, seconds: float, where: str) -> None:
    logger.info(
        "%d image%s in %.1f s (%.2f s each, loading included) in %s",
        saved, "s" * (saved != 1), seconds, seconds / max(saved, 1), where,
    )  # fmt: skip
