"""Trains a TAESD for a model: it learns the model's own autoencoder, latents of an image and image of latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ldm.checkpoints.formats.write import types_for, write_safetensors
from ldm.config import read_config
from ldm.files import written_whole
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.diffusionmodules.taesd import TAESDDecoder, TAESDEncoder
from ldm.pipeline import load_model
from ldm.places import find
from ldm.training.autoencoder import crop_batches, gradient_difference, psnr, to_pixels
from ldm.training.runs import Optimisation
from ldm.training.stage import Stage


class TAESDTraining(pl.LightningModule):
    """Trains a TAESD of a `width` on batches of images [B, 3, H, W] in [-1, 1]; the truth is a model's autoencoder.

    The decoder's loss is L1 + 4 MSE + slope difference to what the model decodes, for images in [0, 1]; the encoder's
    is the MSE of scaled latents, times `latent_weight`. Latents get noise of standard deviation `noise`: a U-Net's
    are not exactly those of any image.
    """

    def __init__(
        self,
        model: LatentDiffusion,
        optimisation: Optimisation,
        width: int,
        noise: float,
        latent_weight: float = 0.05,
    ) -> None:
        super().__init__()
        self._truth = (model,)  # no part of this module's state
        self.networks = nn.ModuleDict(
            {"encoder": TAESDEncoder(model.channels, width), "decoder": TAESDDecoder(model.channels, width)}
        )
        self.optimisation = optimisation
        self.noise, self.latent_weight = noise, latent_weight

    def training_step(self, x: Tensor) -> Tensor:
        latents = self._latents(x)
        noisy = latents + self.noise * torch.randn_like(latents)
        made, true = self.networks["decoder"](noisy).float(), self._image(noisy)
        encoded = F.mse_loss(self.networks["encoder"]((x + 1) / 2).float(), latents)
        mse = F.mse_loss(made, true)
        loss = (
            F.l1_loss(made, true) + 4 * mse + gradient_difference(made, true) + self.latent_weight * encoded
        )
        self.log("loss", loss.detach())
        self.log("latents", encoded.detach())
        self.log("psnr", -10 * torch.log10(mse.detach()))
        return loss

    def validation_step(self, x: Tensor) -> None:
        latents = self._latents(x)
        made, true = self.networks["decoder"](latents).float(), self._image(latents)
        self.log("val_psnr", psnr(2 * made - 1, 2 * true - 1).mean(), prog_bar=True)

    @torch.no_grad()
    def _latents(self, x: Tensor) -> Tensor:
        (model,) = self._truth
        return model.get_first_stage_encoding(model.encode_first_stage(x)).float()

    @torch.no_grad()
    def _image(self, latents: Tensor) -> Tensor:
        """The image that the model decodes, in [0, 1]."""
        return (self._truth[0].decode_first_stage(latents).float().clamp(-1, 1) + 1) / 2

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        return self.optimisation.configure(self.networks.parameters())

    def state(self) -> dict[str, Tensor]:
        """Both halves in float16, under the names of a file with both."""
        return {
            f"taesd_{half}.{key}": value.half().contiguous()
            for half, network in self.networks.items()
            for key, value in network.state_dict().items()
        }


def train_taesd(stage: Stage) -> None:
    """Trains on rendered scenes, with the autoencoder of the model `training.of` as the truth -> a file for --vae."""
    options, data, path = stage.config.training, stage.config.data, Path(stage.config.export)
    images = stage.rendered("train", data.train)
    fresh = DataLoader[Any](to_pixels(stage.rendered("fresh", data.validation)), batch_size=16)  # type: ignore[arg-type]
    model = load_model(read_config(stage.config.model), find(options.of))
    module = TAESDTraining(model, stage.optimisation, options.width, options.noise)
    stage.train(
        module, crop_batches(images, options.batch_size, options.crop, stage.optimisation.steps), fresh
    )
    state = module.state()
    with written_whole(path, overwrite=True) as part:
        write_safetensors(part, state, types_for(state, None), {"format": "pt"})
