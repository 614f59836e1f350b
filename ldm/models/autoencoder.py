"""The autoencoder between images and the latents that diffusion works on (Rombach et al. 2022)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.modules.diffusionmodules.model import CH_MULT, Decoder, Encoder
from ldm.modules.diffusionmodules.taesd import LEVELS, TAESDDecoder, TAESDEncoder
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.util import InputError, instantiate_from_config, printable

logger = logging.getLogger(__name__)


def downsampling(ddconfig: Mapping[str, Any]) -> int:
    """Returns how many pixels one latent value spans along each side, by the config of encoder and decoder."""
    return 2 ** (len(ddconfig.get("ch_mult", CH_MULT)) - 1)


class AutoencoderKL(nn.Module):
    """Images [B, 3, H, W] in [-1, 1] <-> latents [B, embed_dim, H/f, W/f], f being `downsampling`.

    `ddconfig` describes encoder and decoder. `image_key` and `monitor` are for training; `ckpt_path` is not
    read: weights come from the checkpoint that the user names.
    """

    def __init__(
        self,
        ddconfig: Mapping[str, Any],
        lossconfig: Mapping[str, Any],
        embed_dim: int,
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        image_key: str = "image",
        colorize_nlabels: int | None = None,
        monitor: str | None = None,
    ):
        super().__init__()
        if ckpt_path is not None:
            logger.warning("the config's ckpt_path %s is ignored", printable(ckpt_path))
        self.image_key, self.monitor = image_key, monitor
        self.ignore_keys, self.colorize_nlabels = ignore_keys, colorize_nlabels
        self.downsampling = downsampling(ddconfig)
        self.encoder = Encoder(**ddconfig)
        self.decoder = Decoder(**ddconfig)
        self.loss = instantiate_from_config(lossconfig)
        z_channels = ddconfig["z_channels"]
        self.embed_dim = embed_dim
        self.quant_conv = nn.Conv2d(2 * z_channels, 2 * embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, z_channels, 1)

    @property
    def widths(self) -> list[int]:
        """Returns the channels of the levels, the finest first."""
        return [level.block[0].conv1.out_channels for level in self.encoder.down]  # type: ignore[union-attr, index]

    def encode(self, x: Tensor) -> DiagonalGaussianDistribution:
        """Encodes images in [-1, 1] as the distribution of their latents."""
        return DiagonalGaussianDistribution(self.quant_conv(self.encoder(x)))

    def decode(self, z: Tensor) -> Tensor:
        """Decodes (unscaled) latents to images, approximately in [-1, 1]."""
        assert self.post_quant_conv.bias is not None
        return self.decoder(self.post_quant_conv(z.to(self.post_quant_conv.bias.dtype)))

    def forward(
        self, input: Tensor, sample_posterior: bool = True
    ) -> tuple[Tensor, DiagonalGaussianDistribution]:
        """Returns the reconstruction and the latent distribution of `input`."""
        posterior = self.encode(input)
        return self.decode(posterior.sample() if sample_posterior else posterior.mode()), posterior


class SmallAutoencoder(AutoencoderKL):
    """An autoencoder with TAESD's network, of this `width`, for its encoder, its decoder or both: its `halves`.

    TAESD works on latents that are multiplied by `scale_factor`, that of the diffusion model. Its encoder gives one
    latent of an image, so the distribution is as narrow as there is.
    """

    def __init__(self, *args: Any, halves: Sequence[str], width: int, scale_factor: float, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.downsampling != 2**LEVELS:
            raise InputError(f"TAESD halves the size {LEVELS} times, which this model's autoencoder does not")
        self.halves, self.width, self.scale_factor = tuple(halves), width, scale_factor
        if "encoder" in halves:
            self.encoder, self.quant_conv = TAESDEncoder(self.embed_dim, width), nn.Identity()
        if "decoder" in halves:
            self.decoder, self.post_quant_conv = TAESDDecoder(self.embed_dim, width), nn.Identity()

    @property
    def widths(self) -> list[int]:
        return [self.width] if "encoder" in self.halves else super().widths

    def encode(self, x: Tensor) -> DiagonalGaussianDistribution:
        if "encoder" not in self.halves:
            return super().encode(x)
        mean = self.encoder((x + 1) / 2) / self.scale_factor
        return DiagonalGaussianDistribution(torch.cat([mean, torch.full_like(mean, -30.0)], dim=1))

    def decode(self, z: Tensor) -> Tensor:
        if "decoder" not in self.halves:
            return super().decode(z)
        weight = next(self.decoder.parameters())
        return 2 * self.decoder((z * self.scale_factor).to(weight.dtype)).float() - 1


class IdentityFirstStage(nn.Module):
    """Diffusion on the images themselves: nothing is encoded. `vq_interface` makes `quantize` like a `VQModel`'s."""

    def __init__(self, *args: Any, vq_interface: bool = False, **kwargs: Any):
        super().__init__()
        self.vq_interface = vq_interface

    def encode(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        return x

    def decode(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        return x

    def quantize(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        return (x, None, [None, None, None]) if self.vq_interface else x

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        return x


class VQModel(nn.Module):
    """The original's autoencoder with a codebook, which no v1 model has: a name for `isinstance`."""

    def __init__(self, *args: Any, **kwargs: Any):
        raise InputError(
            f"{type(self).__name__} is not supported: this toolkit has no codebooks; use AutoencoderKL"
        )


class VQModelInterface(VQModel):
    """The same with the interface that latent diffusion uses."""
