"""Enlarges images and latents in full float precision."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F


def enlarge_pixels(x: Tensor, height: int, width: int) -> Tensor:
    """Resamples images [N, C, H, W] in [-1, 1] to [N, C, height, width] with Pillow's Lanczos filter.

    Nothing is rounded to 8 bits. The filter overshoots at edges, so the result is clamped to [-1, 1]. Computed
    in float32 on the CPU; device and dtype of the result are those of `x`.
    """
    channels = x.detach().float().cpu().flatten(0, 1).numpy()
    resized = np.stack([_lanczos(channel, height, width) for channel in channels])
    return torch.unflatten(torch.from_numpy(resized).clamp(-1.0, 1.0), 0, x.shape[:2]).to(x)


def _lanczos(channel: np.ndarray, height: int, width: int) -> np.ndarray:
    image = Image.fromarray(np.ascontiguousarray(channel))  # float32 becomes Pillow's mode F
    return np.asarray(image.resize((width, height), Image.Resampling.LANCZOS))


def enlarge_latents(z: Tensor, height: int, width: int) -> Tensor:
    """Interpolates latents [N, C, h, w] bilinearly to [N, C, height, width] cells, corners not aligned."""
    return F.interpolate(z, size=(height, width), mode="bilinear", align_corners=False)
