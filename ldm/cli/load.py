"""A run's model, ready to make images, and what the metadata says of it."""

from __future__ import annotations

import argparse
import logging
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ldm import __version__
from ldm.cli.claim import Source, files_by_part
from ldm.cli.locate import model_name
from ldm.cli.plan import Plan
from ldm.job import Job, lora_name
from ldm.places import cache_path

if TYPE_CHECKING:
    import torch

    from ldm.checkpoints.adapters.embeddings import Embeddings
    from ldm.models.diffusion.ddpm import LatentDiffusion
    from ldm.pipeline import Pipeline
    from ldm.runtime.device import Precision

logger = logging.getLogger("ldm")


def load(opt: argparse.Namespace, plan: Plan, source: Source) -> tuple[Pipeline, Embeddings | None]:
    """The model on its device, with the LoRAs of the run read and its textual inversions known."""
    from ldm.checkpoints.cache import identity
    from ldm.pipeline import Pipeline, load_model

    model = partial(
        load_model,
        config=source.config,
        ckpt=source.ckpt,
        device=source.here.device,
        ema=opt.ema,
        mmap=not opt.no_mmap,
        vae=opt.vae,
        text_encoder=opt.text_encoder,
        dtype=None,
        cache=_weights_cache(opt, source.here.device, source.precision),
    )
    shape = partial(
        Pipeline, precision=source.precision, tiles=opt.tiles, lowmem=opt.lowmem, compiled=opt.compile
    )
    files = [file for of_part in files_by_part(opt, source.ckpt).values() for file in of_part]
    key = model.keywords, shape.keywords, identity(files)
    pipeline = source.kept.get(key, lambda: shape(model()))
    pipeline.start_over(source.canvases, source.find_lora)
    embeddings = _embeddings(opt, pipeline.model)
    for name in plan.loras():
        pipeline.loras.read(name)
    return pipeline, embeddings


def _weights_cache(opt: argparse.Namespace, device: torch.device, precision: Precision) -> Path | None:
    """The folder of cached weights, if they are wanted and of use."""
    if opt.cache_weights is None:
        return None
    if device.type != "cpu" or precision.name != "bf16":
        logger.info(
            "--cache_weights is for bf16 on a CPU; %s on %s reads the checkpoint", precision.name, device
        )
        return None
    return Path(opt.cache_weights) if opt.cache_weights else cache_path("weights")


def extras_of(
    opt: argparse.Namespace,
    source: Source,
    hashes: Mapping[str, Callable[[], str]],
    embeddings: Embeddings | None,
) -> Callable[[Job], dict[str, str]]:
    """What else the metadata of a job's picture says, so that the command can be typed again.

    LoRAs and textual inversions are named as AUTOMATIC1111's web UI does it.
    """
    from ldm.checkpoints.adapters.lora_files import lora_hash
    from ldm.checkpoints.hashing import file_sha256
    from ldm.metadata.infotext import file_name

    extras = {
        "Model": model_name(source.ckpt),
        "Config": source.config_path.stem,
        "Precision": source.precision.name,
        "Version": f"ldm {__version__}",
    }
    if opt.ema != "auto":
        extras["EMA"] = opt.ema
    if opt.seed_mode == "batch":
        extras["Batch size"] = str(opt.n_samples)
    if opt.fixed_code:
        extras["Fixed code"] = "on"
    if opt.no_watermark:
        extras["Watermark"] = "off"
    if opt.vae is not None:
        extras["VAE"] = Path(opt.vae).name
    if opt.text_encoder is not None:
        extras["Text encoder"] = Path(opt.text_encoder).name

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


def _embeddings(opt: argparse.Namespace, model: LatentDiffusion) -> Embeddings | None:
    """The textual inversions that prompts can use; None if there are none."""
    if not opt.embedding and opt.embedding_dir is None:
        return None
    from ldm.checkpoints.adapters.embeddings import Embeddings

    return Embeddings(model.cond_stage_model, opt.embedding, opt.embedding_dir)


def _listed(hashes: Mapping[str, str]) -> str:
    return ", ".join(f"{re.sub('[:,]', '', name)}: {digest}" for name, digest in hashes.items())
