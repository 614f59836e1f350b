"""Trains the autoencoder: sharp reconstructions of images, latents of moderate size."""

from __future__ import annotations

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor

from ldm.models.autoencoder import AutoencoderKL
from ldm.training.runs import MakeBatch, Optimisation


def to_pixels(images: np.ndarray) -> Tensor:
    """Converts uint8 [..., H, W, 3] to float [..., 3, H, W] in [-1, 1]."""
    return torch.tensor(np.asarray(images)).movedim(-1, -3).float() / 127.5 - 1


def crop_batches(images: np.ndarray, batch_size: int, crop: int, whole_from: int) -> MakeBatch:
    """Returns a maker of batches of random `crop` x `crop` windows of `images` (uint8 [N, H, W, 3]).

    From batch `whole_from` on they are whole images, in a smaller number with as many pixels per batch.
    """

    def make(number: int, rng: np.random.Generator) -> Tensor:
        height, width = images.shape[1:3]
        size = crop if number < whole_from else min(height, width)
        count = max(1, batch_size * crop**2 // size**2)
        tops, lefts = rng.integers(height - size + 1, size=count), rng.integers(width - size + 1, size=count)
        chosen = rng.integers(len(images), size=count)
        windows = [images[i, y : y + size, x : x + size] for i, y, x in zip(chosen, tops, lefts, strict=True)]
        return to_pixels(np.stack(windows))

    return make


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Returns the peak signal-to-noise ratio in dB of each image of two batches in [-1, 1], after clamping."""
    return 10 * torch.log10(4 / (x.clamp(-1, 1) - y.clamp(-1, 1)).square().flatten(1).mean(1))


def gradient_difference(x: Tensor, y: Tensor) -> Tensor:
    """Returns the mean absolute difference of the slopes of two batches; it penalises blurred edges."""
    error = x - y
    return error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()


@torch.no_grad()
def start_sharp(model: AutoencoderKL) -> None:
    """Scales a new model's latents by three and makes them almost noiseless, so that it learns faster."""
    means = model.embed_dim
    model.quant_conv.weight[:means] *= 3
    assert model.quant_conv.bias is not None
    model.quant_conv.bias[means:] -= 6  # log variance


class AutoencoderTraining(pl.LightningModule):
    """Trains `model` on batches [B, 3, H, W] in [-1, 1].

    The loss is L1 + `mse_weight` * MSE + `edge_weight` * slope difference + `kl_weight` * KL, where KL is the
    divergence from a standard normal in nats per latent number.
    """

    def __init__(
        self,
        model: AutoencoderKL,
        optimisation: Optimisation,
        kl_weight: float = 1e-6,
        mse_weight: float = 4.0,
        edge_weight: float = 0.25,
    ) -> None:
        super().__init__()
        self.model = model
        self.optimisation = optimisation
        self.kl_weight, self.mse_weight, self.edge_weight = kl_weight, mse_weight, edge_weight

    def training_step(self, x: Tensor) -> Tensor:
        reconstruction, posterior = self.model(x)
        reconstruction = reconstruction.float()
        mse = F.mse_loss(reconstruction, x)
        kl = posterior.kl().float().mean() / posterior.mean[0].numel()
        loss = (
            F.l1_loss(reconstruction, x)
            + self.mse_weight * mse
            + self.edge_weight * gradient_difference(reconstruction, x)
            + self.kl_weight * kl
        )
        self.log("loss", loss.detach())
        self.log("kl", kl.detach())
        self.log("psnr", 10 * torch.log10(4 / mse.detach()))
        return loss

    def validation_step(self, x: Tensor) -> None:
        self.log("val_psnr", psnr(self.model.decode(self.model.encode(x).mode()), x).mean(), prog_bar=True)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        return self.optimisation.configure(self.model.parameters())


@torch.no_grad()
def latent_scale(model: AutoencoderKL, images: np.ndarray, batch_size: int = 16) -> float:
    """Returns 1 / standard deviation of the latents (samples of the posterior) of `images` (uint8 [N, H, W, 3])."""
    latents = [
        model.encode(to_pixels(images[i : i + batch_size])).sample()
        for i in range(0, len(images), batch_size)
    ]
    return 1 / torch.cat(latents).std().item()
