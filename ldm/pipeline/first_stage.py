"""Images -> latents -> images: the autoencoder, one call at a time, in tiles where memory is short."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldm.checkpoints.small_decoder import read_small_decoder
from ldm.images.pixels import finite, to_uint8
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.pipeline.colours import colours_of, fit_colours, half_images
from ldm.pipeline.placement import Placement
from ldm.runtime.device import widened
from ldm.runtime.memory import available_memory
from ldm.runtime.tiling import Tiling, choose_tile, decode_in_tiles, encode_in_tiles, needed_memory

LARGE = 500_000_000  # bytes: v1 at 512x512 needs more, in bf16 too


class FirstStage:
    """The autoencoder of a model. Threads may share it: it runs for one of them at a time.

    `tiles` is as in `Pipeline`; `tile_sides` holds the choice of `tile_side` for each size.
    """

    def __init__(self, model: LatentDiffusion, placement: Placement, tiles: Tiling) -> None:
        self.tiles: Tiling = tiles
        self._model, self._placement = model, placement
        self._lock = threading.Lock()
        self._colours: Tensor | None = None
        self.clear()

    def clear(self) -> None:
        """Forgets which tiles were chosen."""
        self.tile_sides: dict[tuple[int, int], int | None] = {}

    @property
    def factor(self) -> int:
        """How many pixels one latent value spans along each side."""
        return self._model.first_stage_model.downsampling

    def tile_side(self, height: int, width: int) -> int | None:
        """The side in latent cells of the tiles for images of a size; None if they are not cut.

        It is chosen once for each size, so that all images agree.
        """
        if (size := (height, width)) not in self.tile_sides:
            widths, available = self._model.first_stage_model.widths, available_memory(self._model.device)
            self.tile_sides[size] = choose_tile(self.tiles, widths, self.factor, size, available)
        return self.tile_sides[size]

    def encode(self, image: Tensor) -> DiagonalGaussianDistribution:
        """The distribution of the latents of a float image [1, 3, H, W], in float32 as in the original."""
        with self._lock, self._placement.on_device(self._model.first_stage_model):
            if not (tile := self.tile_side(*image.shape[-2:])):
                return self._model.encode_first_stage(image)

            def moments(x: Tensor) -> Tensor:
                return self._model.encode_first_stage(x).parameters

            return DiagonalGaussianDistribution(
                encode_in_tiles(moments, image, self.factor, tile, overlap=tile // 4)
            )

    def decode(self, latent: Tensor) -> Tensor:
        """The image [1, 3, H, W] of scaled latents; in half precision it may have overflowed, see `repaired`."""
        with self._lock, self._placement.running(self._model.first_stage_model):
            if self._is_large(latent):
                self._placement.make_room(self._model.cond_stage_model)
            return self._decoder(latent)(latent)

    def repaired(self, latent: Tensor, decoded: Tensor) -> tuple[Tensor, bool]:
        """A decoded image, and whether half precision overflowed: then it is decoded again in float32."""
        if self._placement.precision.dtype != torch.float16 or finite(decoded)[0]:
            return decoded, False
        autoencoder = self._model.first_stage_model
        decoding = autoencoder.decoder, autoencoder.post_quant_conv
        with self._lock, self._placement.on_device(autoencoder), widened(*decoding):
            return self._decoder(latent)(latent.float()), True

    def decode_all(self, latents: Tensor) -> list[Tensor]:
        """The images [1, 3, H, W] of scaled latents [N, C, h, w], repaired where half precision overflowed."""
        return [self.repaired(latent, self.decode(latent))[0] for latent in torch.split(latents, 1)]

    def pixels(self, latents: Tensor) -> np.ndarray:
        """The uint8 images [N, H, W, 3] of scaled latents [N, C, h, w]."""
        return np.concatenate([to_uint8(image) for image in self.decode_all(latents)])

    def colours(self, latents: Tensor) -> np.ndarray:
        """The uint8 colours [N, h, w, 3] of scaled latents [N, C, h, w], see `ldm.pipeline.colours`."""
        if self._colours is None:
            self._colours = fit_colours(self.decode, latents.shape[1], latents.device)
        return to_uint8(colours_of(latents, self._colours))

    def small_decoder(self, path: str | Path) -> Callable[[Tensor], np.ndarray]:
        """The function of `half_images` with the TAESD of a file, for this model's latents."""
        decoder = read_small_decoder(path, self._model.channels)
        decoder.to(self._model.device, self._placement.precision.dtype)
        return partial(half_images, decoder.to(memory_format=torch.channels_last))  # type: ignore[call-overload]

    def _is_large(self, latent: Tensor) -> bool:
        """Whether decoding needs so much memory that others should first give back what they do not need now."""
        tile = self._tile(latent)
        cells = latent.shape[-2:].numel() if tile is None else tile**2
        pixels = cells * self.factor**2
        needed = needed_memory(self._model.first_stage_model.widths, pixels)
        return needed * self._placement.precision.dtype.itemsize / 4 > LARGE

    def _decoder(self, latent: Tensor) -> Callable[[Tensor], Tensor]:
        """The function that decodes latents of this size, as a whole or in tiles."""
        decode = self._model.decode_first_stage
        if tile := self._tile(latent):
            return partial(decode_in_tiles, decode, factor=self.factor, tile=tile, overlap=tile // 4)
        return decode

    def _tile(self, latent: Tensor) -> int | None:
        return self.tile_side(*(side * self.factor for side in latent.shape[-2:]))
