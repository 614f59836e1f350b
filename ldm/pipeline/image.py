"""A finished image with what belongs to it, one that is still being made, and a step on the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from ldm.images.mask import paste
from ldm.images.pixels import finite, to_uint8
from ldm.images.region import Region
from ldm.images.resample import enlarge_pixels
from ldm.job import Job
from ldm.safety.screen import Verdict

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class StepInfo:
    """A finished denoising step, for a callback: number `index` of `total`, counted from 0.

    `estimate` [N, C, h, w] are the clean latents as the model predicts them now; `Pipeline.decode` shows them, and
    `Pipeline.colours` as a small image. `rows` are their images' places in the batch.
    """

    index: int
    total: int
    estimate: Tensor
    rows: Sequence[int] = ()


OnStep = Callable[[StepInfo], object]  # one that returns False stops there


@dataclass(frozen=True)
class GeneratedImage:
    """The result of a job: uint8 pixels [H, W, 3], or None if they were not finite, and notes for the metadata.

    `kept`, bool [H, W], is True where the pixels are those of the image that the job started from; `latent`
    [C, h, w] is what was decoded, scaled as the U-Net sees it.
    """

    job: Job
    pixels: np.ndarray | None
    notes: Mapping[str, str]
    kept: np.ndarray | None = None
    latent: Tensor | None = None

    @property
    def image(self) -> Image.Image:
        """The image for PIL. Raises ValueError if its pixels were not finite."""
        from PIL import Image

        if self.pixels is None:
            raise ValueError(f"the model gave no finite image for seed {self.job.seed}; try float32")
        return Image.fromarray(self.pixels)

    def screened(self, verdict: Verdict, entries: Mapping[str, str]) -> GeneratedImage:
        """The result of the safety check, with `entries` of the model in the notes."""
        notes = {**entries, **self.notes, "Safety": verdict.word}
        return replace(self, pixels=verdict.pixels, notes=notes)

    def save(self, path: str | Path, watermark: bool = True, overwrite: bool = False) -> Path:
        """Writes a PNG file as the scripts do: whole or not at all, with the settings that make it again.

        Pixels are marked with the invisible watermark, except those that the user's own image keeps. Raises
        FileExistsError if `path` exists and `overwrite` is off, ValueError if the pixels were not finite.
        """
        from ldm.images.watermark import Watermark
        from ldm.images.writer import encode_png, publish
        from ldm.metadata.infotext import infotext
        from ldm.metadata.record import record

        pixels = np.asarray(self.image)
        if watermark:
            marked = Watermark().mark(pixels)
            if self.kept is not None:
                marked[self.kept] = pixels[self.kept]
            pixels = marked
        notes = self.notes if watermark else {**self.notes, "Watermark": "off"}
        data = encode_png(pixels, infotext(self.job, notes), record=record(self.job, notes))
        publish(Path(path), data, overwrite)
        return Path(path)


@dataclass(frozen=True)
class Paste:
    """The image that a job started from, whose own pixels are put back wherever `weight` is 0.

    `pixels` are uint8 [H, W, 3] of all of it; `original` [1, 3, h, w] in [-1, 1] and `weight` [1, 1, h, w] of the
    part that was made, or of all of it where there is no `region`.
    """

    original: Tensor
    weight: Tensor
    pixels: np.ndarray
    region: Region | None = None

    def paste(self, decoded: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """The image [H, W, 3] with a decoded one [1, 3, h, w], and where it is as it was, bool [H, W]."""
        made = decoded.float()
        if self.region is not None:
            if made.shape[-2:] != self.region.size:
                made = enlarge_pixels(made, *self.region.size)
            made = made[(..., *self.region.within)]
        part = ... if self.region is None else self.region.visible
        pixels, kept = self.pixels.copy(), np.ones(self.pixels.shape[:2], bool)
        kept[part] = (self.weight == 0)[0, 0].cpu().numpy()
        new = to_uint8(paste(made, self.original, self.weight))[0]
        pixels[part] = np.where(kept[part][..., None], pixels[part], new)
        return pixels, kept


@dataclass(frozen=True)
class Pending:
    """An image that the device may still be at work on: its latent [1, C, h, w], and that decoded [1, 3, H, W]."""

    job: Job
    latent: Tensor
    decoded: Tensor
    notes: Mapping[str, str]
    paste: Paste | None

    def finish(self, repaired: Callable[[Tensor, Tensor], tuple[Tensor, bool]]) -> GeneratedImage:
        """Waits for the image, which is `FirstStage.repaired` first, and puts back what `paste` keeps."""
        decoded, overflowed = repaired(self.latent, self.decoded)
        notes = {**self.notes, "Decoded in": "float32"} if overflowed else self.notes
        latent = self.latent[0]
        if not finite(decoded)[0]:
            return GeneratedImage(self.job, None, notes, latent=latent)
        if self.paste is None:
            return GeneratedImage(self.job, to_uint8(decoded)[0], notes, latent=latent)
        pixels, kept = self.paste.paste(decoded)
        return GeneratedImage(self.job, pixels, notes, kept, latent)
