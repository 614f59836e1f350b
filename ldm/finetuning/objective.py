"""The loss: the squared error of the prediction, weighted by the noise level."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.guidance import Conditioning
from ldm.modules.diffusionmodules.util import extract_into_tensor
from ldm.training.diffusion import min_snr_weights


def snr_weights(
    alphas_cumprod: Tensor, prediction: str, min_snr_gamma: float | None = None, debiased: bool = False
) -> Tensor:
    """Returns the weight of the loss at each timestep, of the shape of `alphas_cumprod`.

    With `min_snr_gamma` see `min_snr_weights`; `debiased`: 1 / sqrt(SNR), SNR at most 1000 (Yu et al. 2023). SNR is
    abar / (1 - abar).
    """
    weights = torch.ones_like(alphas_cumprod)
    if min_snr_gamma is not None:
        weights = min_snr_weights(alphas_cumprod, min_snr_gamma, prediction)
    if debiased:
        snr = alphas_cumprod / (1 - alphas_cumprod)
        weights = weights / snr.clamp(max=1000).sqrt()
    return weights


def usual_target(model: LatentDiffusion, latents: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Returns what a model is trained to predict, [N, ...]: the noise, or v."""
    return velocity(model, latents, t, noise) if model.parameterization == "v" else noise


def velocity(model: LatentDiffusion, latents: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Returns v = sqrt(abar) noise - sqrt(1 - abar) latents, [N, ...] (Salimans and Ho 2022, section 4)."""
    tables = (model.sqrt_alphas_cumprod, model.sqrt_one_minus_alphas_cumprod)
    signal, spread = (extract_into_tensor(table, t, latents.shape) for table in tables)
    return signal * noise - spread * latents


@dataclass(frozen=True)
class Objective:
    """The loss of a model's prediction; `loss` is "l2" or "huber" (pseudo-Huber with c = 0.1)."""

    min_snr_gamma: float | None = None
    debiased: bool = False
    loss: Literal["l2", "huber"] = "l2"

    def __call__(
        self,
        model: LatentDiffusion,
        latents: Tensor,
        t: Tensor,
        noise: Tensor,
        cond: Conditioning,
        target: Tensor | None = None,
    ) -> Tensor:
        """Returns the loss of each image [N] for scaled latents [N, C, h, w] (Ho et al. 2020, equation 14).

        `target` is what should be predicted, by default `usual_target`.
        """
        x = model.q_sample(latents, t, noise)
        predicted = model.apply_model(x, t, cond).float()
        if target is None:
            target = usual_target(model, latents, t, noise)
        error = (predicted - target.float()).square()
        if self.loss == "huber":
            error = 0.2 * ((error + 0.01).sqrt() - 0.1)
        weights = snr_weights(model.alphas_cumprod, model.parameterization, self.min_snr_gamma, self.debiased)
        return weights[t] * error.flatten(1).mean(1)
