"""Converts 8-bit pixels to the autoencoder's input, and its output to 8-bit pixels."""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
from torch import Tensor


def from_uint8(pixels: np.ndarray) -> Tensor:
    """Converts images for the autoencoder: uint8 [N, H, W, 3] to float32 [N, 3, H, W] in [-1, 1] in CPU memory.

    The original's arithmetic: divided by 255 in float32, then doubled, then less 1.
    """
    unit = pixels.astype(np.float32) / np.float32(255.0)
    return torch.from_numpy(2.0 * unit - 1.0).permute(0, 3, 1, 2).contiguous()


def to_uint8(decoded: Tensor) -> np.ndarray:
    """Returns the pixels of decoded images, truncated rather than rounded, as in the original.

    `decoded` is [N, 3, H, W] in [-1, 1], any float type, any device (values outside are clamped, NaN has no
    meaning); the result is uint8 [N, H, W, 3] in CPU memory. Computed in float32 on the tensor's device, so
    that only bytes are copied.
    """
    unit = ((decoded.float() + 1.0) / 2.0).clamp(0.0, 1.0)
    return (255.0 * unit).to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def finite(images: Tensor) -> list[bool]:
    """Returns for each image of [N, ...] whether it is free of NaN and infinity."""
    return cast("list[bool]", torch.isfinite(images).flatten(1).all(dim=1).tolist())
