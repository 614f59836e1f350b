"""From the autoencoder's output to the bytes of a picture."""

from __future__ import annotations

import numpy as np
from torch import Tensor, isfinite, uint8


def to_uint8(decoded: Tensor) -> np.ndarray:
    """The pixels of decoded images, cut off rather than rounded, as the original wrote them.

    `decoded` is [N, 3, H, W] in [-1, 1], any float type, any device (values outside are clamped, NaN has no
    meaning); the result is uint8 [N, H, W, 3] in CPU memory. Computed in float32 on the tensor's device, so
    that only bytes are copied.
    """
    unit = ((decoded.float() + 1.0) / 2.0).clamp(0.0, 1.0)
    return (255.0 * unit).to(uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def finite(images: Tensor) -> list[bool]:
    """For each image of [N, ...]: whether it is free of NaN and infinity."""
    return isfinite(images).flatten(1).all(dim=1).tolist()
