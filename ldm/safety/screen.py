"""The safety check on finished images: the input of the model, and the verdict on each image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.util import printable

_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


class SafetyError(RuntimeError):
    """The safety check itself failed, so none of the images that it was given may be shown."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The verdict on an image: its uint8 pixels [H, W, 3], black if it was flagged, and a word for the record.

    An image that does not exist (None) remains None and is unchecked.
    """

    pixels: np.ndarray | None
    word: Literal["passed", "flagged", "unchecked"]


def prepare(images: Sequence[np.ndarray], side: int) -> Tensor:
    """Converts uint8 images [H, W, 3] to CLIP's input: float32 [N, 3, side, side] in CPU memory, normalised.

    The shorter side is resized to `side` (bicubic), and the middle is cut out, as CLIP was trained (Radford et
    al. 2021). The images may differ in size.
    """
    squares = np.stack([_middle_square(image, side) for image in images])
    normalised = (squares / np.float32(255) - _MEAN) / _STD
    return torch.from_numpy(normalised).permute(0, 3, 1, 2).contiguous()


def _middle_square(pixels: np.ndarray, side: int) -> np.ndarray:
    height, width = pixels.shape[:2]
    shorter = min(height, width)
    size = (side * width // shorter, side * height // shorter)
    resized = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    return np.asarray(resized.crop((left, top, left + side, top + side)))


class Screen:
    """The one place where images are checked: a flagged one is blanked, and a failing check lets none through.

    `flag` takes the output of `prepare` for up to `batch` images at `side` pixels and returns bool [N], such as a
    `SafetyChecker`; None checks nothing.
    """

    def __init__(self, flag: Callable[[Tensor], Tensor] | None, side: int = 224, batch: int = 8) -> None:
        self._flag, self._side, self._batch = flag, side, batch

    @property
    def checks(self) -> bool:
        """Whether images are checked at all."""
        return self._flag is not None

    def screen(self, images: Sequence[np.ndarray | None]) -> list[Verdict]:
        """Returns a verdict for each image, in order. Raises SafetyError, without any verdict, if the check fails."""
        if self._flag is None:
            return [Verdict(pixels, "unchecked") for pixels in images]
        flags = iter(self._flags([pixels for pixels in images if pixels is not None], self._flag))
        return [_verdict(pixels, pixels is not None and next(flags)) for pixels in images]

    @torch.inference_mode()
    def _flags(self, images: Sequence[np.ndarray], flag: Callable[[Tensor], Tensor]) -> list[bool]:
        found: list[bool] = []
        try:
            for start in range(0, len(images), self._batch):
                batch = images[start : start + self._batch]
                found += _as_bools(flag(prepare(batch, self._side)), len(batch))
        except Exception as error:  # whatever the error is, no image may pass
            reason = printable(f"{type(error).__name__}: {error}")
            raise SafetyError(f"the safety check failed, so its images are withheld: {reason}") from error
        return found


def _as_bools(flags: Tensor, count: int) -> list[bool]:
    if flags.dtype != torch.bool or flags.shape != (count,):
        raise ValueError(f"the check returned {flags.dtype} {list(flags.shape)} for {count} images")
    return cast("list[bool]", flags.tolist())


def _verdict(pixels: np.ndarray | None, flagged: bool) -> Verdict:
    if pixels is None:
        return Verdict(None, "unchecked")
    return Verdict(np.zeros_like(pixels), "flagged") if flagged else Verdict(pixels, "passed")
