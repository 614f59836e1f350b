"""One run, from options to files."""

from __future__ import annotations

import argparse
import contextlib
import logging
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli import ranks
from ldm.cli.claim import Claim, Source
from ldm.cli.estimate import check_batches
from ldm.cli.inputs import (
    RANDOM,
    Canvases,
    check_additions,
    check_latents,
    check_options,
    choose_model,
    find_loras,
    need,
    note_jobs,
    read_starts,
)
from ldm.cli.kept import KeptModel
from ldm.cli.load import extras_of, load
from ldm.cli.manifest import last_seed
from ldm.cli.output import Output, Present, make_mark, make_screen
from ldm.cli.plan import Plan, check_job, count_steps, read_wishes, schedule_length
from ldm.cli.preview import show
from ldm.cli.report import Events, Interrupts, Progress, name_process, outcome
from ldm.cli.sampling import Halves, generate
from ldm.cli.sheets import write_sheets
from ldm.job import Job
from ldm.util import FULL_DISK, InputError, printable

if TYPE_CHECKING:
    from ldm.checkpoints.adapters.lora_files import LoraFiles
    from ldm.pipeline import Pipeline

logger = logging.getLogger("ldm")

Planner = Callable[[argparse.Namespace, Mapping[str, Any], "LoraFiles"], Plan]


def plan_options(opt: argparse.Namespace, config: Mapping[str, Any], find_lora: LoraFiles) -> Plan:
    """What the options and the files that they name ask of a config's model."""
    wishes, canvases = read_wishes(opt), Canvases(mask_needed=opt.inpaint)
    starts = read_starts(opt, config, canvases)
    plan = Plan(opt, wishes, starts, canvases, lambda job: check_job(job, config, find_lora))
    note_jobs(plan.kinds(), config)
    return plan


def run(
    opt: argparse.Namespace,
    kept: KeptModel | None = None,
    planner: Planner = plan_options,
    name_files: bool = True,
) -> int:
    """Text and images to images: the exit code. The model is `kept` for the next run, or comes from the last one.

    `planner` makes the plan from the options, the checked config and what finds LoRAs; it may raise InputError.
    With `name_files` each file's path is printed. With --json every outcome ends in the event `done`, else faults
    are raised.
    """
    tally = Tally()
    with Events(opt.json) as events:
        if not opt.json:
            return _run(opt, kept, planner, name_files, events, tally)
        code = 1
        try:
            code = outcome(lambda: _run(opt, kept, planner, name_files, events, tally), opt.debug)
        except SystemExit as left:  # told twice to stop
            code = left.code if isinstance(left.code, int) else 1
            raise
        finally:
            seconds = round(time.monotonic() - tally.started, 3)
            made = {} if tally.elsewhere else {"saved": tally.saved, "failed": tally.failed}
            events.emit("done", **made, seconds=seconds, code=code)
        return code


@dataclass
class Tally:
    """What there was before a run, what it has made so far, and since when."""

    existing: int = 0
    saved: int = 0
    failed: int = 0
    elsewhere: bool = False  # in processes that count for themselves
    started: float = field(default_factory=time.monotonic)


def _run(
    opt: argparse.Namespace,
    kept: KeptModel | None,
    planner: Planner,
    name_files: bool,
    events: Events,
    tally: Tally,
) -> int:
    ranks.hush(opt)
    if opt.seed == RANDOM:
        opt.seed = _random_seed(opt)
    check_options(opt)
    check_additions(opt)
    need(not opt.verify or opt.resume, "--verify checks the files of a run that continues; give --resume too")
    for option, reason in (("resume", "continue"), ("gallery", "show")):
        need(
            not (getattr(opt, option) and opt.skip_save),
            f"--skip_save leaves no files for --{option} to {reason}; leave one of them out",
        )

    need(
        opt.on_oom != "halve" or opt.seed_mode == "image",
        "--on_oom halve changes the size of batches, on which the noise of --seed_mode batch depends; "
        "leave one of them out",
    )

    from ldm.config import read_config

    config_path, ckpt_path = choose_model(opt)

    from ldm.runtime.device import resolve_device, resolve_precision  # torch, which takes seconds

    device = resolve_device(opt.device)
    ranks.check(opt, device)
    find_lora = find_loras(opt)
    config = read_config(config_path, opt.allow_targets)
    check_latents(opt, config)
    plan = planner(opt, config, find_lora)
    kept = kept or KeptModel()

    def source_of(here: ranks.Alone) -> Source:
        precision = resolve_precision(opt.precision, here.device)
        return Source(config_path, config, ckpt_path, here, precision, plan.canvases, find_lora, kept)

    if opt.dry_run:
        _tell_steps(plan[0])
        return show(opt, plan, source_of(ranks.Alone(device)), events)
    code = ranks.start(opt)
    if code is not None:
        tally.elsewhere = True
        return code
    here = ranks.join(opt, device)
    if here.world > 1:
        name_process(here.rank, here.world, opt.quiet, opt.debug)
        events.about["process"] = here.rank
    source = source_of(here)
    _tell_steps(plan[0])
    check_batches(opt, plan, config, here.device, source.precision.dtype)
    try:
        return _make(opt, plan, source, name_files, events, tally)
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        logger.debug("", exc_info=True)
        rest = " with --resume" if name_files and not opt.skip_save else ""
        logger.error(
            "error: disk full in %s: %d of %d images saved; free space and run the same command%s",
            printable(opt.outdir), tally.existing + tally.saved, len(plan), rest,
        )  # fmt: skip
        return 1


def _random_seed(opt: argparse.Namespace) -> int:
    """Any seed, or with --resume that of the folder's newest run; processes that this one starts get it too."""
    need(
        not ranks.is_one_of_several(opt) or ranks.starts_all(opt),
        "--seed random would be another seed in each process; give a number",
    )
    last = last_seed(Path(opt.outdir)) if opt.resume else None
    seed = secrets.randbits(32) if last is None else last  # every generator takes 32 bits
    logger.info("seed %d (%s)", seed, "random" if last is None else "that of the run that continues")
    if opt.typed is not None:
        opt.typed = [*opt.typed, f"--seed={seed}"]
    return seed


def _make(
    opt: argparse.Namespace, plan: Plan, source: Source, name_files: bool, events: Events, tally: Tally
) -> int:
    """Makes and writes what this process has to make of a plan: the exit code."""
    from ldm.images.writer import RunFolder
    from ldm.safety.screen import Screen

    here, several = source.here, source.here.world > 1
    on_cpu = here.device.type == "cpu"
    with RunFolder(opt.outdir) as folder, Interrupts() as interrupts:
        claim = Claim(opt, folder, plan, source)
        # what is refused is refused before the model is loaded, and what is there is not made again
        present = Present(claim.take(), opt.verify) if opt.resume else None
        missing = [batch for batch in plan.wanted() if present is None or present.lacks(batch)]
        mark, screen, pipeline, embeddings = make_mark(opt), Screen(None), None, None
        if missing:
            screen = make_screen(opt, here.device)
            pipeline, embeddings = load(opt, plan, source)
            logger.info(
                "model loaded in %.1f s; %s, %s",
                time.monotonic() - tally.started, here.device, source.precision.name,
            )  # fmt: skip
            _settle_tiles(pipeline, plan, claim, here)
        claimed = claim.take()
        present = present or Present(claimed, verify=False)
        tally.existing = len(present.whole)
        batches = here.share(missing)
        here.part()
        progress = Progress(
            sum(map(len, batches)),
            sum(count_steps(plan[batch[0]]) for batch in batches),
            opt.quiet or here.rank > 0,
            events,
        )
        extras = extras_of(opt, source, claimed.hashes, embeddings)
        output = Output(
            opt,
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
            failed = output.failed and not opt.keep_going
            return bool(failed or interrupts.received or here.deserted)

        try:
            with contextlib.closing(claimed), contextlib.closing(progress), output:
                try:
                    if pipeline is not None:
                        halves = Halves(opt, claimed, progress)
                        making = generate(opt, pipeline, plan, batches, progress, halves, stopped)
                        for indices, pending in making:
                            output.add(indices, partial(pipeline.finish, pending))
                except InputError as error:  # an image to start from went away meanwhile
                    output.give_up(error)
                except Exception as error:
                    if not (opt.compile and interrupts.received):
                        raise
                    logger.debug("the signal reached the compiler too: %s", printable(error))
                pages = bool(missing) or not claimed.has_pages()
                if output.finish(pages) and pages and not opt.skip_save:
                    write_sheets(plan, claimed, mark, output.fail)
        finally:
            tally.saved, tally.failed = output.saved, output.failed
    seconds = time.monotonic() - tally.started
    where = printable(folder.path)
    if missing:
        logger.info(
            "%d image%s in %.1f s (%.2f s each, loading included) in %s",
            output.saved, "s" * (output.saved != 1), seconds, seconds / max(output.saved, 1), where,
        )  # fmt: skip
    else:
        logger.info("nothing to do: all %d images exist in %s", len(plan), where)
    code = 128 + interrupts.received if interrupts.received else 1 if output.failed else 0
    if code and name_files and not opt.skip_save and not output.complete and not here.supervised:
        logger.warning(ranks.REST)
    return code


def _settle_tiles(pipeline: Pipeline, plan: Plan, claim: Claim, here: ranks.Alone) -> None:
    """Lets all processes, and a run that continues, use the tiles that were chosen at its beginning.

    The choice depends on the memory that is free at that moment.
    """
    kinds = plan.kinds()
    sizes = {size for job in kinds for size in ((job.height, job.width), job.upscaled_size)}
    run = claim.run
    noted = None if run is None else run.tiles
    if noted is None:
        noted = {size: here.agree(pipeline.tile_side(*size) or 0) or None for size in sorted(sizes)}
        if run is None:
            claim.take(noted)
        else:
            run.note_tiles(noted, leads=here.rank == 0, shared=here.world > 1)
    pipeline.tile_sides.update(noted)


def _tell_steps(job: Job) -> None:
    """Says how many denoising steps a picture takes where it is not what was asked for."""
    from ldm.models.diffusion.schedule import steps_to_run

    rows = schedule_length(job)
    if rows != job.steps:
        logger.info("compvis spacing has %d steps for --ddim_steps %d", rows, job.steps)
    if job.init is not None:
        steps = steps_to_run(job.strength, job.steps, rows)
        logger.info("strength %g: %d of %d steps run", job.strength, steps, rows)
        if steps == 0:
            logger.info("so the picture only passes through the autoencoder")
    if job.upscale > 1:
        again = steps_to_run(job.upscale_strength, job.steps, rows)
        logger.info("upscaling at strength %g: %d of %d more steps", job.upscale_strength, again, rows)
