"""Small images of latents: by a linear map that is fitted to a model's own decoder, or by a TAESD."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ldm.images.pixels import to_uint8
from ldm.modules.diffusionmodules.taesd import TAESDDecoder

_PATCHES, _SIDE = 8, 32  # patches of one colour along each side, and latent cells


def fit_colours(decode: Callable[[Tensor], Tensor], channels: int, device: torch.device) -> Tensor:
    """Returns the matrix [channels + 1, 3] from a latent and 1 to the mean colour of its pixels, in [-1, 1].

    It fits random patches of scaled latents, as `decode` shows them, by least squares.
    """
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(1, channels, _PATCHES, _PATCHES, generator=generator)
    latents = F.interpolate(patches, size=(_SIDE, _SIDE))
    image = decode(latents.to(device)).float().cpu().clamp(-1, 1)
    colours = F.adaptive_avg_pool2d(image, _SIDE)
    return cast(
        "Tensor", torch.linalg.lstsq(_with_one(latents), colours.movedim(1, -1).flatten(0, -2)).solution
    )


def colours_of(latents: Tensor, matrix: Tensor) -> Tensor:
    """Returns the colours [N, 3, h, w], about in [-1, 1], of scaled latents [N, C, h, w]."""
    count, _, height, width = latents.shape
    return (
        (_with_one(latents.float()) @ matrix.to(latents.device)).view(count, height, width, 3).movedim(-1, 1)
    )


def half_images(decoder: TAESDDecoder, latents: Tensor) -> np.ndarray:
    """Returns what a TAESD decodes of scaled latents [N, C, h, w], at half its size: uint8 [N, 4 h, 4 w, 3]."""
    first = next(decoder.parameters())
    images = [decoder(part.to(first.device, first.dtype)) for part in torch.split(latents, 1)]
    return to_uint8(F.avg_pool2d(torch.cat(images).float(), 2) * 2 - 1)


def _with_one(latents: Tensor) -> Tensor:
    cells = latents.movedim(1, -1).flatten(0, -2)
    return F.pad(cells, (0, 1), value=1.0)
