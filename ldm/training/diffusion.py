"""Trains the U-Net to predict the noise in the latents of captioned scenes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor

from ldm.data.captions import caption
from ldm.data.scenes import scene_at
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.ema import LitEma
from ldm.training.autoencoder import to_pixels
from ldm.training.runs import MakeBatch, Optimisation
from ldm.util import need


@torch.no_grad()
def encode_latents(
    model: AutoencoderKL,
    images: np.ndarray,
    path: Path,
    batch_size: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Writes mean and standard deviation of images' latents to `path`: float16 [N, 2, C, h, w], unscaled.

    `images` is uint8 [N, H, W, 3]; `progress` is called with (images encoded, N).
    """
    size = (images.shape[1] // model.downsampling, images.shape[2] // model.downsampling)
    part = path.with_suffix(".npy.tmp")
    moments = np.lib.format.open_memmap(part, "w+", np.float16, (len(images), 2, model.embed_dim, *size))
    for start in range(0, len(images), batch_size):
        batch = to_pixels(images[start : start + batch_size])
        with torch.autocast(batch.device.type, dtype=torch.bfloat16):
            posterior = model.encode(batch)
        both = torch.stack([posterior.mean, posterior.std], dim=1)
        moments[start : start + len(batch)] = both.float().numpy()
        if progress:
            progress(start + len(batch), len(images))
    moments.flush()
    part.replace(path)
    return path


class NoiseBatch(NamedTuple):
    """The inputs of one step: unscaled latents [B, C, h, w], B prompts, timesteps [B], noise."""

    latents: Tensor
    prompts: list[str]
    t: Tensor
    noise: Tensor


def noise_batches(
    moments: np.ndarray,
    split: str,
    batch_size: int,
    num_timesteps: int,
    drop: float = 0.1,
    mismatch: float = 0.0,
) -> MakeBatch:
    """Returns a maker of batches of a split's first scenes, whose `moments` are as written by `encode_latents`.

    Latents are sampled from their distributions; every visit of a scene samples a new caption. A fraction `drop` of
    the prompts is empty, for guidance, and a fraction `mismatch` of the others describes another scene, as captions
    from the web do. Timesteps are uniform, one from each of `batch_size` equal slices of the schedule, which makes
    the loss less noisy.
    """

    def prompt(scene: int, rng: np.random.Generator) -> str:
        if rng.random() < drop:
            return ""
        if rng.random() < mismatch:
            scene = int(rng.integers(len(moments)))
        return caption(scene_at(scene, split), rng)

    def make(number: int, rng: np.random.Generator) -> NoiseBatch:
        chosen = np.sort(rng.integers(len(moments), size=batch_size))
        mean, std = np.moveaxis(moments[chosen].astype(np.float32), 1, 0)
        draw, noise = rng.standard_normal((2, *mean.shape), dtype=np.float32)
        prompts = [prompt(int(i), rng) for i in chosen]
        t = (rng.permutation(batch_size) + rng.random(batch_size)) * num_timesteps / batch_size
        return NoiseBatch(
            torch.from_numpy(mean + std * draw), prompts, torch.from_numpy(t).long(), torch.from_numpy(noise)
        )

    return make


def min_snr_weights(alphas_cumprod: Tensor, gamma: float, prediction: str = "eps") -> Tensor:
    """Returns the loss weights of Hang et al. 2023 (section 3.4) at each timestep.

    They are min(SNR, gamma) / SNR for predictions of the noise, min(SNR, gamma) / (SNR + 1) for those of v.
    """
    snr = alphas_cumprod / (1 - alphas_cumprod)
    return snr.clamp(max=gamma) / (snr + 1 if prediction == "v" else snr)


class DiffusionTraining(pl.LightningModule):
    """Trains `model.model` on `NoiseBatch`es; autoencoder and text encoder are frozen.

    The loss is the mean squared error of the predicted noise (DDPM, equation 14), weighted by `min_snr_weights` if
    `min_snr_gamma` is given. `ema` follows the U-Net after every optimiser step.
    """

    def __init__(
        self,
        model: LatentDiffusion,
        optimisation: Optimisation,
        ema_decay: float = 0.999,
        min_snr_gamma: float | None = 5.0,
    ) -> None:
        super().__init__()
        need(model.parameterization == "eps", "training is for models that predict the noise, not v")
        self.model = model
        model.first_stage_model.requires_grad_(False)
        model.cond_stage_model.requires_grad_(False)
        self.ema = LitEma(model.model, decay=ema_decay)
        self.optimisation = optimisation
        weights = torch.ones(model.num_timesteps)
        if min_snr_gamma is not None:
            weights = min_snr_weights(model.alphas_cumprod, min_snr_gamma)
        self.weights: Tensor
        self.register_buffer("weights", weights, persistent=False)

    def training_step(self, batch: NoiseBatch) -> Tensor:
        with torch.no_grad():
            context = self.model.get_learned_conditioning(batch.prompts)
        x = self.model.q_sample(self.model.get_first_stage_encoding(batch.latents), batch.t, batch.noise)
        predicted = self.model.apply_model(x, batch.t, context).float()
        errors = (predicted - batch.noise).square().flatten(1).mean(1)
        self.log("error", errors.detach().mean(), batch_size=len(errors))
        return (self.weights[batch.t] * errors).mean()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.ema(self.model.model)  # here, so that the states saved after the step include it

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        return self.optimisation.configure(self.model.model.parameters())
