"""The invisible watermark of the original scripts, with the pixels of the library that they used."""

from __future__ import annotations

import logging
import math
from typing import Any, NamedTuple

import numpy as np

from ldm.util import InputError, printable

logger = logging.getLogger(__name__)

TEXT = "StableDiffusionV1"
INPAINTING_TEXT = "StableDiffusionV1-Inpainting"  # of the published inpainting app
METHOD = "dwtDct"
_MIN_AREA = 256 * 256  # the library refuses images below it
_BLOCK = 8  # pixels of a side of the square that carries one bit
_STRIP_PIXELS = 2**22


class Evidence(NamedTuple):
    """The agreement of an image with a watermark text."""

    agreeing_bits: int
    total_bits: int
    chance: float  # probability that as many bits or more agree in an image without a watermark


def too_small(width: int, height: int) -> bool:
    """Returns whether the library refuses to mark an image of this size (its area counts, not its sides)."""
    return width * height < _MIN_AREA


class Watermark:
    """Marks images with `text`. Raises InputError at once if the watermark library cannot be imported."""

    def __init__(self, text: str = TEXT) -> None:
        self._bits = _bits_of(text)
        self._library = _library()
        self._noted_small = False

    def mark(self, rgb: np.ndarray) -> np.ndarray:
        """Returns a marked copy of uint8 RGB pixels [H, W, 3]; an image that is too small is returned unchanged.

        Tall images are marked in strips to spare memory. A bit depends on nothing outside its block of 8x8
        pixels, so the result is the same.
        """
        height, width, _ = rgb.shape
        if too_small(width, height):
            self._note_small(width, height)
            return rgb
        marked = np.empty_like(rgb)
        for top, bottom in _strips(width, height):
            blocks_above = top // _BLOCK * (width // _BLOCK)
            marked[top:bottom] = self._mark_strip(rgb[top:bottom], blocks_above)
        return marked

    def _mark_strip(self, rgb: np.ndarray, blocks_above: int) -> np.ndarray:
        encoder = self._library.WatermarkEncoder()
        encoder.set_watermark("bits", np.roll(self._bits, -blocks_above).tolist())
        return encoder.encode(_swap_red_and_blue(rgb), METHOD)[..., ::-1]

    def _note_small(self, width: int, height: int) -> None:
        if not self._noted_small:
            logger.info("images of %dx%d are too small for the invisible watermark", width, height)
            self._noted_small = True


def detect(rgb: np.ndarray, text: str = TEXT) -> Evidence:
    """Counts the bits of `text` in the uint8 RGB pixels [H, W, 3], and returns how likely that count is by chance.

    The watermark of an image can seldom be read exactly: setting a bit to 0 can make another place of its block
    the one that is read. So the result is a count and the tail of the binomial distribution with one half, not yes or
    no. Raises InputError if the image has no room for the text or the library cannot be imported.
    """
    expected = _bits_of(text)
    height, width, _ = rgb.shape
    if too_small(width, height) or (width // _BLOCK) * (height // _BLOCK) < expected.size:
        raise InputError(f"an image of {width}x{height} is too small to hold the watermark {text!r}")
    decoder = _library().WatermarkDecoder("bits", expected.size)
    found = np.asarray(decoder.decode(_swap_red_and_blue(rgb), METHOD))
    agreeing = int((found == expected.astype(bool)).sum())
    return Evidence(agreeing, expected.size, _binomial_tail(agreeing, expected.size))


def _binomial_tail(least: int, total: int) -> float:
    """Returns the probability of `least` heads or more in `total` tosses of a coin."""
    return sum(math.comb(total, k) for k in range(least, total + 1)) / 2**total


def _bits_of(text: str) -> np.ndarray:
    return np.unpackbits(np.frombuffer(text.encode("utf-8"), np.uint8))


def _swap_red_and_blue(pixels: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(pixels[..., ::-1])


def _strips(width: int, height: int) -> list[tuple[int, int]]:
    """Cuts `height` rows into strips of whole blocks; the last one takes the remainder."""
    rows = max(_STRIP_PIXELS // width // _BLOCK, 1) * _BLOCK
    tops = list(range(0, max(height - rows, 0) + 1, rows))
    return list(zip(tops, [*tops[1:], height], strict=True))


def _library() -> Any:
    try:
        import imwatermark
    except ImportError as error:
        raise InputError(
            f"the invisible watermark cannot be used: {printable(error)}; `pip install invisible-watermark` "
            "(on a machine without libGL also opencv-python-headless), or leave it out with --no_watermark"
        ) from error
    return imwatermark
