"""A run before it begins: the model, the device and the plan, checked."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.job import Job
from ldm.runs.checks import check_controls, check_job, suit_to
from ldm.runs.model_cache import ModelCache
from ldm.runs.models import check_latents, choose_model, find_loras
from ldm.runs.notes import note_jobs
from ldm.runs.options import Request, RunOptions
from ldm.runs.plan import Plan, read_prompts
from ldm.runs.processes import ProcessInfo, check
from ldm.runs.source import Source
from ldm.runs.starts import Canvases, read_starts
from ldm.runs.weights import weights_identity
from ldm.util import need

if TYPE_CHECKING:
    import torch

    from ldm.checkpoints.adapters.lora_files import LoraFiles

logger = logging.getLogger("ldm")

Planner = Callable[[Mapping[str, Any], "LoraFiles"], Plan]  # from a checked config and the finder of LoRAs


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
    return settle(options, cache, reads_input)(planner)


def settle(
    options: RunOptions, cache: ModelCache | None = None, reads_input: bool = False
) -> Callable[[Planner], Prepared]:
    """Finds the model and the device; returns what makes a run of a plan for them. The rest is as in `prepare`."""
    from ldm.config import read_config

    config_path, ckpt = choose_model(options)

    from ldm.checkpoints.model_files import read_model
    from ldm.checkpoints.variants import suited
    from ldm.runtime.device import resolve_device  # torch, which takes seconds

    device = resolve_device(options.device)
    need(
        not options.compile or options.precision != "int8",
        "--compile and --precision int8 exclude each other: torch's compiler has no 8-bit products; leave one out",
    )
    stdin_copy = check(options, device, reads_input)
    find_lora = find_loras(options)
    config = read_config(config_path, options.allow_targets)
    files = read_model(
        ckpt, vae=options.vae, text_encoder=options.text_encoder, prediction=options.prediction
    )
    config = suited(config, files)
    check_latents(options, config)
    kept = cache or ModelCache()
    kept.opened = weights_identity(options, ckpt), files
    return lambda planner: Prepared(
        options, planner(config, find_lora), config_path, config, ckpt, device, find_lora, kept, stdin_copy
    )


def plan_request(
    options: RunOptions, request: Request, config: Mapping[str, Any], find_lora: LoraFiles
) -> Plan:
    """Makes the plan of a request for a config's model."""
    prompts, canvases = read_prompts(options, request), Canvases(options.inpaint, config)
    starts = read_starts(request, options.inpaint, config, canvases)

    def check(job: Job) -> None:
        check_job(job, config, find_lora)
        need(
            job.is_exact or not options.compile,
            "--compile needs the whole U-Net, of which cache_steps and merge_tokens leave parts out; leave one out",
        )

    plan = Plan(options, request, prompts, starts, canvases, check, suit_to(config))
    ckpt = None if options.ckpt is None else Path(options.ckpt)
    note_jobs(plan.kinds(), config, ckpt, find_lora)
    check_controls(plan.controls(), config)
    return plan


def log_steps(job: Job) -> None:
    """Logs the number of denoising steps of an image if it differs from the requested one."""
    from ldm.models.diffusion.passes import passes_of, schedule_length, schedule_of

    rows, (first, *second) = schedule_length(job), passes_of(job)
    if rows != job.steps:
        own = job.timestep_spacing == "compvis"
        name = "compvis spacing" if own else f"the schedule {schedule_of(job).name}"
        logger.info("%s has %d steps for --ddim_steps %d", name, rows, job.steps)
    if job.init is not None:
        logger.info("strength %g: %d of %d steps run", job.strength, first.steps, rows)
        if first.steps == 0:
            logger.info("so the image only passes through the autoencoder")
    for again in second:
        logger.info("upscaling at strength %g: %d of %d more steps", job.upscale_strength, again.steps, rows)
