"""The model's part of an image's metadata."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ldm import __version__
from ldm.job import Job, lora_name
from ldm.runs.options import RunOptions
from ldm.runs.plan import Plan
from ldm.runs.source import Source

if TYPE_CHECKING:
    from ldm.checkpoints.adapters.embeddings import Embeddings


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
    from ldm.checkpoints.adapters.control import control_file, control_parts
    from ldm.checkpoints.adapters.lora_files import lora_hash
    from ldm.checkpoints.hashing import file_sha256, files_sha256
    from ldm.checkpoints.image_encoder import encoder_hash
    from ldm.config import section
    from ldm.metadata.infotext import file_name, model_name

    extras = {
        "Model": model_name(source.ckpt),
        "Config": source.config_path.stem,
        "Precision": source.precision.name,
        "Version": f"ldm {__version__}",
    }
    if options.ema != "auto":
        extras["EMA"] = options.ema
    if options.prediction != "auto":
        extras["Prediction"] = options.prediction
    if plan[0].seed_mode == "batch":
        extras["Batch size"] = str(options.n_samples)
    if options.fixed_code:
        extras["Fixed code"] = "on"
    if options.no_watermark:
        extras["Watermark"] = "off"
    if options.vae is not None:
        extras["VAE"] = Path(options.vae).name
    for half in section(source.config, "first_stage_config").get("halves", ()):
        extras[f"VAE {half.capitalize()}"] = "TAESD"  # the web UI's names
    if options.upscaler is not None:
        extras["Upscaler"] = Path(options.upscaler).name
    if options.text_encoder is not None:
        extras["Text encoder"] = Path(options.text_encoder).name

    def of(job: Job) -> dict[str, str]:
        entries = {**{name: digest()[:10] for name, digest in hashes.items()}, **extras}
        if job.init is not None:
            canvas = source.canvases(job.init)
            entries |= {"Init image hash": canvas.digest[:10], "Mask hash": canvas.mask_digest[:10]}
        loras = {lora_name(file_name(name)): lora_hash(source.find_lora(name)) for name, *_ in job.loras}
        parts = {file: files_sha256(control_parts(control_file(file)))[:12] for file, *_ in job.controls}
        networks = {file_name(file): digest for file, digest in parts.items()}
        encoders = {file_name(file): encoder_hash(control_file(file))[:12] for file, *_ in job.controls}
        hints = {file_name(image): file_sha256(Path(image))[:12] for _, image, *_ in job.controls}
        entries |= {"Control hashes": _listed(networks), "Hint hashes": _listed(hints)}
        entries |= {"Image encoder hashes": _listed({name: one for name, one in encoders.items() if one})}
        used = embeddings.used_in(job.prompt, job.negative_prompt) if embeddings else []
        inversions = {e.name: file_sha256(e.path)[:12] for e in used}
        return {**entries, "Lora hashes": _listed(loras), "TI hashes": _listed(inversions)}

    return of


def _listed(hashes: Mapping[str, str]) -> str:
    return ", ".join(f"{re.sub('[:,]', '', name)}: {digest}" for name, digest in hashes.items())
