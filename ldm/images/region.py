"""The part of an image around its mask, to be repainted alone at another size and put back."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

Box = tuple[int, int, int, int]  # left, top, right, bottom


@dataclass(frozen=True, eq=False, slots=True)
class Region:
    """A part of an image, `box`: (left, top, right, bottom), which may reach beyond the image.

    `pixels` are uint8 [H, W, 3] of all of the image, and `repaint` [H, W] is what of it is repainted.
    """

    pixels: np.ndarray
    repaint: np.ndarray
    box: Box

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the box."""
        left, top, right, bottom = self.box
        return bottom - top, right - left

    @property
    def visible(self) -> tuple[slice, slice]:
        """Rows and columns of the image that the box shows."""
        left, top, right, bottom = self.box
        height, width = self.repaint.shape
        return slice(max(top, 0), min(bottom, height)), slice(max(left, 0), min(right, width))

    @property
    def within(self) -> tuple[slice, slice]:
        """Rows and columns of the box within the image."""
        left, top, _, _ = self.box
        rows, columns = self.visible
        return slice(rows.start - top, rows.stop - top), slice(columns.start - left, columns.stop - left)

    def cut(self, pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """The box of an image [H, W, ...] as large as this one, at height and width `size`.

        Beyond the image its nearest pixels are repeated. Lanczos for colours; for a mask, whose numbers are floats
        from 0 to 1 or bools, bilinear, and what was True in part is True.
        """
        rows, columns = self.visible
        (above, below), (before, after) = (
            (inner.start, length - inner.stop) for inner, length in zip(self.within, self.size, strict=True)
        )
        around = ((above, below), (before, after), *[(0, 0)] * (pixels.ndim - 2))
        part = np.pad(pixels[rows, columns], around, mode="edge")
        if part.shape[:2] == size:
            return part
        colour = pixels.ndim == 3
        image = Image.fromarray(part if colour else part.astype(np.float32))
        resample = Image.Resampling.LANCZOS if colour else Image.Resampling.BILINEAR
        resized = np.array(image.resize((size[1], size[0]), resample))
        return resized > 0 if pixels.dtype == bool else resized


def region_around(pixels: np.ndarray, repaint: np.ndarray, padding: int, size: tuple[int, int]) -> Region:
    """The smallest region with all that is repainted, `padding` pixels around it, and the aspect of a size.

    `size` is (height, width). The region grows evenly to that aspect, and moves into the image as far as it can.
    """
    aspect = size[1] / size[0]
    top, bottom = _padded(np.atleast_1d(repaint.any(axis=1)), padding)
    left, right = _padded(np.atleast_1d(repaint.any(axis=0)), padding)
    height, width = bottom - top, right - left
    height, width = max(height, round(width / aspect)), max(width, round(height * aspect))
    top, bottom = _grown(top, bottom, height, repaint.shape[0])
    left, right = _grown(left, right, width, repaint.shape[1])
    return Region(pixels, repaint, (left, top, right, bottom))


def _padded(there: np.ndarray, padding: int) -> tuple[int, int]:
    """From the first to the last True of a row, and `padding` more at either end, within the row."""
    (found,) = np.nonzero(there)
    return max(int(found[0]) - padding, 0), min(int(found[-1]) + 1 + padding, len(there))


def _grown(start: int, stop: int, length: int, whole: int) -> tuple[int, int]:
    """A range that is grown evenly to a length; within a whole that is long enough, else around its middle."""
    first = start - (length - (stop - start)) // 2
    first = (whole - length) // 2 if length > whole else min(max(first, 0), whole - length)
    return first, first + length
