"""Loads what a run needs to make images: the model, its LoRAs and textual inversions, and the safety checker."""

from __future__ import annotations

import logging
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ldm.places import cache_path
from ldm.runs.claim import Claim
from ldm.runs.options import RunOptions
from ldm.runs.plan import Plan
from ldm.runs.processes import ProcessInfo
from ldm.runs.source import Source
from ldm.runs.weights import files_of_model, weights_identity

if TYPE_CHECKING:
    import torch

    from ldm.checkpoints.adapters.embeddings import Embeddings
    from ldm.models.diffusion.ddpm import LatentDiffusion
    from ldm.pipeline import Pipeline
    from ldm.safety.screen import Screen

logger = logging.getLogger("ldm")


class Loaded(NamedTuple):
    """The model, the safety check and the textual inversions of a run: no pipeline if none is missing."""

    screen: Screen
    pipeline: Pipeline | None = None
    embeddings: Embeddings | None = None


def load_nothing() -> Loaded:
    """Returns what a run needs of which all images exist."""
    from ldm.safety.screen import Screen

    return Loaded(Screen(None))


def load(options: RunOptions, plan: Plan, source: Source, claim: Claim, started: float) -> Loaded:
    """Loads the model to its device, and settles the tiles. The run began at the monotonic time `started`."""
    here = source.here
    screen = source.cache.screen(options, here.device)
    pipeline = _load_pipeline(options, plan, source)
    embeddings = _embeddings(options, pipeline.model)
    for name in plan.loras():
        pipeline.loras.read(name)
    for name in plan.controls():
        pipeline.control.read(name)
    seconds = time.monotonic() - started
    logger.info("model loaded in %.1f s; %s, %s", seconds, here.device, source.precision.name)
    _settle_tiles(pipeline, plan, claim, here)
    return Loaded(screen, pipeline, embeddings)


def _load_pipeline(options: RunOptions, plan: Plan, source: Source) -> Pipeline:
    """Loads the model to its device, or takes the one that is kept from the run before."""
    from ldm.pipeline import Pipeline, load_model, packed_weights

    model = partial(
        load_model,
        config=source.config,
        ckpt=source.ckpt,
        device=source.here.device,
        ema=options.ema,
        mmap=not options.no_mmap,
        vae=options.vae,
        text_encoder=options.text_encoder,
        prediction=options.prediction,
        dtype=None,
    )
    shape = partial(
        Pipeline,
        precision=source.precision,
        tiles=options.tiles,
        lowmem=options.lowmem,
        compiled=options.compile,
    )
    files = weights_identity(options, source.ckpt)
    folder = _weights_cache(options, source.here.device)
    key = model.keywords, shape.keywords, files, folder

    def load_model_of_run() -> Pipeline:
        opened = source.cache.take_opened(files)
        packed = None
        if folder is not None:
            own = [file for of_part in files_of_model(options, source.ckpt).values() for file in of_part]
            packed = packed_weights(folder, own, options.ema, source.precision)
        return shape(model(checkpoint=None if options.no_mmap else opened), packed=packed)

    pipeline = source.cache.get(key, load_model_of_run)
    source.cache.opened = None
    pipeline.start_over(source.canvases, source.find_lora)
    pipeline.use_upscaler(options.upscaler)
    return pipeline


def _weights_cache(options: RunOptions, device: torch.device) -> Path | None:
    """Returns the folder below which packed weights are kept, if they are enabled and of use."""
    if options.cache_weights is None:
        return None
    from ldm.runtime import opaque

    if device.type != "cpu" or not opaque.works():
        reason = "this torch cannot map packed weights" if device.type == "cpu" else f"not {device}"
        logger.info("--cache_weights is for the CPU, %s: the weights are read from the checkpoint", reason)
        return None
    return Path(options.cache_weights) if options.cache_weights else cache_path("weights")


def _embeddings(options: RunOptions, model: LatentDiffusion) -> Embeddings | None:
    """Returns the textual inversions that prompts can use; None if there are none."""
    if not options.embedding and options.embedding_dir is None:
        return None
    from ldm.checkpoints.adapters.embeddings import Embeddings

    return Embeddings(model.cond_stage_model, options.embedding, options.embedding_dir)


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
