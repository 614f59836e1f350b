"""Measures the difference between two images."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ldm.util import InputError

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, slots=True)
class Difference:
    """The difference between two images: pixels that are equal in all channels, and the values' largest difference.

    `psnr` is the peak signal-to-noise ratio in decibels, infinite for equal images.
    """

    equal: int
    total: int
    largest: int
    psnr: float

    def __str__(self) -> str:
        if self.equal == self.total:
            return f"identical: all {self.total} pixels are equal"
        share = math.floor(1000 * self.equal / self.total) / 10
        return (
            f"different: {self.equal} of {self.total} pixels ({share:g}%) are equal, the largest difference is "
            f"{self.largest} of 255, PSNR {self.psnr:.1f} dB"
        )


def compare(first: np.ndarray, second: np.ndarray) -> Difference:
    """Compares two uint8 images [H, W, 3]. Raises InputError if their sizes differ."""
    import numpy as np

    if first.shape != second.shape:
        sizes = [f"{image.shape[1]}x{image.shape[0]}" for image in (first, second)]
        raise InputError(f"images of {sizes[0]} and {sizes[1]} cannot be compared; make them the same size")
    apart = np.abs(first.astype(np.int16) - second)
    mean_square = float(np.square(apart, dtype=np.float64).mean())
    psnr = 10 * math.log10(255**2 / mean_square) if mean_square else math.inf
    equal = int((apart == 0).all(axis=-1).sum())
    return Difference(equal, apart[..., 0].size, int(apart.max()), psnr)
