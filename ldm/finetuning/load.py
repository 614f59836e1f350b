"""Loads the model that is trained, and names it for the metadata of the file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ldm.checkpoints.hashing import file_sha256
from ldm.checkpoints.layouts.prediction import Choice
from ldm.checkpoints.load import build_model
from ldm.config import read_config
from ldm.finetuning.inpainting import inpainting_config, widened
from ldm.models.diffusion.ddpm import LatentDiffusion, LatentInpaintDiffusion
from ldm.pipeline.load import load_model
from ldm.util import InputError, printable


@dataclass(frozen=True)
class Base:
    """The model that a training begins with: its files, and what it is trained to be."""

    config: Path
    ckpt: Path
    vae: str | None = None
    text_encoder: str | None = None
    prediction: Choice = "auto"
    allow_targets: Sequence[str] = ()
    inpainting: bool = False

    def load(self) -> LatentDiffusion:
        """Returns the model in float32 on the CPU; for `inpainting` one for text gets the channels that it lacks."""
        config = read_config(self.config, self.allow_targets)
        model = load_model(
            config, self.ckpt, vae=self.vae, text_encoder=self.text_encoder, prediction=self.prediction
        )
        if isinstance(model, LatentInpaintDiffusion) or not self.inpainting:
            return model
        if model.parameterization != "eps":
            raise InputError(
                f"{printable(self.ckpt)} predicts v; an inpainting model is made of one for the noise"
            )
        own = build_model(inpainting_config(config))
        own.load_state_dict(widened(model.state_dict()), assign=True)
        return own.eval()

    def notes(self) -> dict[str, str]:
        """Returns entries of metadata that name the model: kohya's, with AUTOMATIC1111's short hash."""
        if not self.ckpt.is_file():
            return {"ss_sd_model_name": self.ckpt.name}
        sha = file_sha256(self.ckpt)
        return {"ss_sd_model_name": self.ckpt.name, "ss_new_sd_model_hash": sha, "ss_sd_model_hash": sha[:10]}
