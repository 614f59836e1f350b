"""Loads a run's model, and collects its metadata."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ldm import __version__
from ldm.job import Job, lora_name
from ldm.places import cache_path
from ldm.runs.claim import Source, files_by_part
from ldm.runs.options import RunOptions
from ldm.runs.plan import Plan

if TYPE_CHECKING:
    import torch

    from ldm.checkpoints.adapters.embeddings import Embeddings
    from ldm.models.diffusion.ddpm import LatentDiffusion
    from ldm.pipeline import Pipeline
    from ldm.runtime.device import Precision

logger = logging.getLogger("ldm")


def load(options: RunOptions, plan: Plan, source: Source) -> tuple[Pipeline, Embeddings | None]:
    """Loads the model to its device, with the LoRAs and textual inversions of the run."""
    from ldm.checkpoints.cache import identity
    from ldm.pipeline import Pipeline, load_model

    model = partial(
        load_model,
        config=source.config,
        ckpt=source.ckpt,
        device=source.here.device,
        ema=options.ema,
        mmap=not options.no_mmap,
        vae=options.vae,
        text_encoder=options.text_encoder,
        dtype=None,
        cache=_weights_cache(options, source.here.device, source.precision),
    )
    shape = partial(
        Pipeline,
        precision=source.precision,
        tiles=options.tiles,
        lowmem=options.lowmem,
        compiled=options.compile,
    )
    files = [file for of_part in files_by_part(options, source.ckpt).values() for file in of_part]
    key = model.keywords, shape.keywords, identity(files)
    pipeline = source.cache.get(key, lambda: shape(model()))
    pipeline.start_over(source.canvases, source.find_lora)
    embeddings = _embeddings(options, pipeline.model)
    for name in plan.loras():
        pipeline.loras.read(name)
    return pipeline, embeddings


def _weights_cache(options: RunOptions, device: torch.device, precision: Precision) -> Path | None:
    """Returns the folder of cached weights, if they are enabled and of use."""
    if options.cache_weights is None:
        return None
    if device.type != "cpu" or precision.name != "bf16":
        logger.info(
            "--cache_weights is for bf16 on a CPU; %s on %s reads the checkpoint", precision.name, device
        )
        return None
    return Path(options.cache_weights) if options.cache_weights else cache_path("weights")


def extras_of(
    options: RunOptions,
    plan: Plan,
    source: Source,
    hashes: Mapping[str, Callable[[], str]],
    embeddings: Embeddings | None,
) -> Callable[[Job], dict[str, str]]:
    """Returns the model's part of an image's metadata, from which the command can be repeated.

    LoRAs and textual inversions are named as AUTOMATIC1111's web UI does it.
    """
    from ldm.checkpoints.adapters.lora_files import lora_hash
    from ldm.checkpoints.hashing import file_sha256
    from ldm.metadata.infotext import file_name, model_name

    extras = {
        "Model": model_name(source.ckpt),
        "Config": source.config_path.stem,
        "Precision": source.precision.name,
        "Version": f"ldm {__version__}",
    }
    if options.ema != "auto":
        extras["EMA"] = options.ema
    if plan[0].seed_mode == "batch":
        extras["Batch size"] = str(options.n_samples)
    if options.fixed_code:
        extras["Fixed code"] = "on"
    if options.no_watermark:
        extras["Watermark"] = "off"
    if options.vae is not None:
        extras["VAE"] = Path(options.vae).name
    if options.text_encoder is not None:
        extras["Text encoder"] = Path(options.text_encoder).name

    def of(job: Job) -> dict[str, str]:
        entries = {**{name: digest()[:10] for name, digest in hashes.items()}, **extras}
        if job.init is not None:
            canvas = source.canvases(job.init)
            entries |= {"Init image hash": canvas.digest[:10], "Mask hash": canvas.mask_digest[:10]}
        loras = {lora_name(file_name(name)): lora_hash(source.find_lora(name)) for name, *_ in job.loras}
        used = embeddings.used_in(job.prompt, job.negative_prompt) if embeddings else []
        inversions = {e.name: file_sha256(e.path)[:12] for e in used}
        return {**entries, "Lora hashes": _listed(loras), "TI hashes": _listed(inversions)}

    return of


def _embeddings(options: RunOptions, model: LatentDiffusion) -> Embeddings | None:
    """Returns the textual inversions that prompts can use; None if there are none."""
    if not options.embedding and options.embedding_dir is None:
        return None
    from ldm.checkpoints.adapters.embeddings import Embeddings

    return Embeddings(model.cond_stage_model, options.embedding, options.embedding_dir)


def _listed(hashes: Mapping[str, str]) -> str:
    return ", ".join(f"{re.sub('[:,]', '', name)}: {digest}" for name, digest in hashes.items())
