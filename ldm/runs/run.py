"""One run, from a plan to files."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.files import FULL_DISK
from ldm.job import Job
from ldm.runs.claim import Claim, Source
from ldm.runs.estimate import check_batches
from ldm.runs.existing import Present
from ldm.runs.jobs import check_job, count_steps
from ldm.runs.load import extras_of, load
from ldm.runs.messages import name_process
from ldm.runs.model_cache import ModelCache
from ldm.runs.models import check_latents, choose_model, find_loras
from ldm.runs.notes import note_jobs
from ldm.runs.options import Request, RunOptions
from ldm.runs.output import Output, make_mark, make_screen
from ldm.runs.plan import Plan, read_wishes
from ldm.runs.processes import REST, ProcessInfo, check, join, start
from ldm.runs.progress import Events, Interrupts, Progress
from ldm.runs.sampling import Halves, generate
from ldm.runs.sheets import write_sheets
from ldm.runs.starts import Canvases, read_starts
from ldm.util import InputError, printable

if TYPE_CHECKING:
    import torch

    from ldm.checkpoints.adapters.lora_files import LoraFiles
    from ldm.pipeline import Pipeline

logger = logging.getLogger("ldm")

Planner = Callable[[Mapping[str, Any], "LoraFiles"], Plan]  # from a checked config and the finder of LoRAs


@dataclass
class Report:
    """The state of a run for its reports: events, images before it, images made so far, and the start time."""

    events: Events
    existing: int = 0
    saved: int = 0
    failed: int = 0
    elsewhere: bool = False  # in processes that report for themselves
    started: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class Prepared:
    """A run that is checked and planned; nothing is loaded, and nothing is written."""

    options: RunOptions
    plan: Plan
    config_path: Path
    config: Mapping[str, Any]
    ckpt: Path
    device: torch.device
    find_lora: LoraFiles
    cache: ModelCache
    stdin_copy: str | None

    def source(self, here: ProcessInfo) -> Source:
        """Returns the source of the images of one process."""
        from ldm.runtime.device import resolve_precision

        precision = resolve_precision(self.options.precision, here.device)
        canvases = self.plan.canvases
        return Source(
            self.config_path, self.config, self.ckpt, here, precision, canvases, self.find_lora, self.cache
        )


def prepare(
    options: RunOptions, planner: Planner, cache: ModelCache | None = None, reads_input: bool = False
) -> Prepared:
    """Finds the model and the device, and makes the plan. Raises InputError for invalid requests.

    `cache` holds the model between runs of one process. With `reads_input` the prompts come from standard input.
    """
    from ldm.config import read_config

    config_path, ckpt = choose_model(options)

    from ldm.runtime.device import resolve_device  # torch, which takes seconds

    device = resolve_device(options.device)
    stdin_copy = check(options, device, reads_input)
    find_lora = find_loras(options)
    config = read_config(config_path, options.allow_targets)
    check_latents(options, config)
    plan = planner(config, find_lora)
    return Prepared(
        options, plan, config_path, config, ckpt, device, find_lora, cache or ModelCache(), stdin_copy
    )


def plan_request(
    options: RunOptions, request: Request, config: Mapping[str, Any], find_lora: LoraFiles
) -> Plan:
    """Makes the plan of a request for a config's model."""
    wishes, canvases = read_wishes(options, request), Canvases(mask_needed=options.inpaint)
    starts = read_starts(request, options.inpaint, config, canvases)
    plan = Plan(options, request, wishes, starts, canvases, lambda job: check_job(job, config, find_lora))
    note_jobs(plan.kinds(), config)
    return plan


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
    check_batches(options, plan, prepared.config, here.device, source.precision.dtype)
    try:
        return _make(options, plan, source, report, name_files)
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


def _make(options: RunOptions, plan: Plan, source: Source, report: Report, name_files: bool) -> int:
    """Makes and writes this process's share of a plan; returns the exit code."""
    from ldm.images.writer import RunFolder
    from ldm.safety.screen import Screen

    here, several, events = source.here, source.here.world > 1, report.events
    on_cpu = here.device.type == "cpu"
    with RunFolder(options.outdir) as folder, Interrupts() as interrupts:
        claim = Claim(options, folder, plan, source)
        # invalid requests are refused before the model is loaded, and existing images are not repeated
        present = Present(claim.take(), options.verify) if options.resume else None
        missing = [batch for batch in plan.wanted() if present is None or present.lacks(batch)]
        mark, screen, pipeline, embeddings = make_mark(options), Screen(None), None, None
        if missing:
            screen = make_screen(options, here.device)
            pipeline, embeddings = load(options, plan, source)
            logger.info(
                "model loaded in %.1f s; %s, %s",
                time.monotonic() - report.started, here.device, source.precision.name,
            )  # fmt: skip
            _settle_tiles(pipeline, plan, claim, here)
        claimed = claim.take()
        present = present or Present(claimed, verify=False)
        report.existing = len(present.whole)
        batches = here.share(missing)
        here.barrier_then_detach()
        progress = Progress(
            sum(map(len, batches)),
            sum(count_steps(plan[batch[0]]) for batch in batches),
            options.quiet or here.rank > 0,
            events,
        )
        extras = extras_of(options, plan, source, claimed.hashes, embeddings)
        output = Output(
            options,
            folder,
            claimed,
            present,
            claim.columns,
            mark,
            screen,
            extras,
            events,
            on_cpu,
            several,
            name_files,
        )
        events.emit(
            "start",
            folder=str(folder.path), run=str(claimed.path), images=len(plan), existing=len(present.whole),
        )  # fmt: skip

        def stopped() -> bool:
            failed = output.failed and not options.keep_going
            return bool(failed or interrupts.received or here.deserted)

        try:
            with contextlib.closing(claimed), contextlib.closing(progress), output:
                try:
                    if pipeline is not None:
                        halves = Halves(options, claimed, progress)
                        making = generate(options, pipeline, plan, batches, progress, halves, stopped)
                        for indices, pending in making:
                            output.add(indices, partial(pipeline.finish, pending))
                except InputError as error:  # a starting image was removed meanwhile
                    output.give_up(error)
                except Exception as error:
                    if not (options.compile and interrupts.received):
                        raise
                    logger.debug("the signal reached the compiler too: %s", printable(error))
                pages = bool(missing) or not claimed.has_pages()
                if output.finish(pages) and pages and not options.skip_save:
                    write_sheets(plan, claimed, mark, output.fail)
        finally:
            report.saved, report.failed = output.saved, output.failed
    seconds = time.monotonic() - report.started
    where = printable(folder.path)
    if missing:
        logger.info(
            "%d image%s in %.1f s (%.2f s each, loading included) in %s",
            output.saved, "s" * (output.saved != 1), seconds, seconds / max(output.saved, 1), where,
        )  # fmt: skip
    else:
        logger.info("nothing to do: all %d images exist in %s", len(plan), where)
    code = 128 + interrupts.received if interrupts.received else 1 if output.failed else 0
    if code and name_files and not options.skip_save and not output.complete and not here.supervised:
        logger.warning(REST)
    return code


def _settle_tiles(pipeline: Pipeline, plan: Plan, claim: Claim, here: ProcessInfo) -> None:
    """Makes all processes, and a resumed run, use the tiles that were chosen at its beginning.

    The choice depends on the memory that is free at that time.
    """
    sizes = {size for job in plan.kinds() for size in ((job.height, job.width), job.upscaled_size)}
    run = claim.run
    noted = None if run is None else run.tiles
    if noted is None:
        noted = {size: here.agree(pipeline.tile_side(*size) or 0) or None for size in sorted(sizes)}
        if run is None:
            claim.take(noted)
        else:
            run.note_tiles(noted, leads=here.rank == 0, shared=here.world > 1)
    pipeline.tile_sides.update(noted)


def log_steps(job: Job) -> None:
    """Logs the number of denoising steps of an image if it differs from the requested one."""
    from ldm.models.diffusion.schedule import passes_of, schedule_length

    rows, (first, *second) = schedule_length(job), passes_of(job)
    if rows != job.steps:
        logger.info("compvis spacing has %d steps for --ddim_steps %d", rows, job.steps)
    if job.init is not None:
        logger.info("strength %g: %d of %d steps run", job.strength, first.steps, rows)
        if first.steps == 0:
            logger.info("so the image only passes through the autoencoder")
    for again in second:
        logger.info("upscaling at strength %g: %d of %d more steps", job.upscale_strength, again.steps, rows)
