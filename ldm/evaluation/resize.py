"""Resizing for networks that measure images; figures depend on it, so every result names its mode.

| mode | filter | as in |
|---|---|---|
| clean | Pillow's bicubic with antialiasing, on floats, each channel alone | clean-fid (arXiv:2104.11222) |
| tensorflow | bilinear without antialiasing, the grid of TensorFlow 1 | torch-fidelity, ADM, the original FID |
| pytorch | bilinear without antialiasing, torch's grid | pytorch-fid |
| pillow | Pillow's bicubic with antialiasing, on 8 bits | CLIP, FD-DINOv2 |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor


def clean(pixels: np.ndarray, side: int) -> Tensor:
    """Resizes uint8 [H, W, 3] to float32 [3, side, side] in [0, 255] by Pillow's bicubic filter."""
    channels = [
        np.asarray(Image.fromarray(channel).resize((side, side), Image.Resampling.BICUBIC))
        for channel in np.ascontiguousarray(pixels.transpose(2, 0, 1), dtype=np.float32)
    ]
    return torch.from_numpy(np.stack(channels)).clamp_(0, 255)


def tensorflow(pixels: np.ndarray, side: int) -> Tensor:
    """Resizes uint8 [H, W, 3] to float32 [3, side, side] in [0, 255] as TensorFlow 1's `resize_bilinear` does.

    Output i is at i * H / side of the input, corners not aligned and no half-pixel centres.
    """
    x = torch.from_numpy(pixels.transpose(2, 0, 1).astype(np.float32))
    for axis in (2, 1):
        length = x.shape[axis]
        place = torch.arange(side, dtype=torch.float32) * torch.tensor(length / side, dtype=torch.float32)
        low = place.long()
        share = (place - low).reshape([-1 if i == axis else 1 for i in range(3)])
        first, second = x.index_select(axis, low), x.index_select(axis, (low + 1).clamp_max(length - 1))
        x = first + (second - first) * share
    return x


def pytorch(pixels: np.ndarray, side: int) -> Tensor:
    """Resizes uint8 [H, W, 3] to float32 [3, side, side] in [0, 255] by torch's bilinear interpolation."""
    x = torch.from_numpy(pixels.transpose(2, 0, 1).astype(np.float32))
    return F.interpolate(x[None], (side, side), mode="bilinear", align_corners=False)[0]


def pillow(pixels: np.ndarray, side: int) -> Tensor:
    """Resizes uint8 [H, W, 3] to float32 [3, side, side] of whole numbers in [0, 255] by Pillow's bicubic filter."""
    resized = Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(resized).transpose(2, 0, 1).astype(np.float32))


MODES: Mapping[str, Callable[[np.ndarray, int], Tensor]] = {
    "clean": clean,
    "tensorflow": tensorflow,
    "pytorch": pytorch,
    "pillow": pillow,
}


def crop_to(pixels: np.ndarray, side: int) -> np.ndarray:
    """Cuts the largest centred square of uint8 [H, W, 3]; resizes it to [side, side, 3] by Pillow's bicubic filter.

    It is how COCO's photographs, which have many sizes, are compared with square images.
    """
    square = centre_square(pixels)
    if len(square) == side:
        return square
    return np.asarray(Image.fromarray(square).resize((side, side), Image.Resampling.BICUBIC))


def centre_square(pixels: np.ndarray) -> np.ndarray:
    """Returns the largest centred square of [H, W, 3]."""
    height, width, _ = pixels.shape
    edge = min(height, width)
    top, left = (height - edge) // 2, (width - edge) // 2
    return np.ascontiguousarray(pixels[top : top + edge, left : left + edge])
