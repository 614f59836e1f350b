"""The latents of the user's images: each image is placed, encoded once, and kept on disk by its content.

A file is written whole or not at all, so a run that was killed continues with those that it has. An image that cannot
be read is named and left out.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ldm.files import written_whole
from ldm.finetuning.buckets import Placement, Size, place
from ldm.finetuning.data import Example
from ldm.images.hints import check_aspect
from ldm.images.pixels import from_uint8
from ldm.images.source import Source, read_image
from ldm.models.autoencoder import AutoencoderKL
from ldm.util import InputError, need, printable

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Placed:
    """An example that could be read: how it is placed, and the files of its latents, upright and mirrored.

    A file holds mean and standard deviation, float32 [2, C, h, w], not scaled for diffusion. `digest` is the SHA-256
    of the image's file.
    """

    example: Example
    placement: Placement
    latents: tuple[Path, ...]
    digest: str = ""


class Placer:
    """Reads images and cuts them to the bucket sizes; `random_crop` moves what is cut out, by seed and content."""

    def __init__(self, sizes: Sequence[Size], random_crop: bool = False, seed: int = 0) -> None:
        self.sizes, self.random_crop, self.seed = sizes, random_crop, seed

    def read(self, example: Example) -> tuple[Source, Placement]:
        """Reads an image and places it; `InputError` if it, or its hint, cannot be read."""
        source = read_image(example.image)
        if example.hint is not None:
            check_aspect(str(example.hint), source.color.size)
        where = (0.5, 0.5)
        if self.random_crop:
            rng = np.random.default_rng([self.seed, int(source.digest[:15], 16)])
            where = (float(rng.random()), float(rng.random()))
        return source, place(source.color.size, self.sizes, where)

    def again(self, image: Placed) -> Source:
        """Reads an image that has been encoded; `InputError` if it is another one by now."""
        source = read_image(image.example.image)
        need(
            source.digest == image.digest,
            f"{printable(image.example.image)} has changed during the training; put it back as it was, and add "
            "--resume",
        )
        return source

    def hint(self, image: Placed) -> Source:
        """Reads the hint of an image: the image itself if it has no other."""
        hint = image.example.hint
        return self.again(image) if hint is None else read_image(str(hint))

    def pixels(self, source: Source, placement: Placement, mirrored: bool) -> Tensor:
        """Returns the pixels that are trained on: [1, 3, H, W] in [-1, 1]; what is transparent becomes white."""
        return from_uint8(self.cut(source, placement, mirrored)[None])

    def cut(
        self, source: Source, placement: Placement, mirrored: bool, background: str = "white"
    ) -> np.ndarray:
        """Returns an image as it is placed, uint8 [H, W, 3]; what is transparent has the `background`."""
        image = source.color
        if source.alpha is not None:
            image = Image.composite(image, Image.new("RGB", image.size, background), source.alpha)
        image = image.resize(placement.scaled, Image.Resampling.LANCZOS)
        (left, top), (width, height) = placement.corner, placement.size
        image = image.crop((left, top, left + width, top + height))
        return np.asarray(ImageOps.mirror(image) if mirrored else image)


def place_all(
    examples: Sequence[Example],
    placer: Placer,
    encode: Callable[[Tensor], Tensor] | None,
    folder: Path,
    progress: Callable[[int, int], None] | None = None,
) -> list[Placed]:
    """Encodes all images that are not in `folder` yet; returns those that could be read.

    `encode` maps pixels [1, 3, H, W] to moments [2, C, h, w]; without it nothing is written. `progress` is called
    with (done, all). If no image can be read, that is an `InputError`.
    """
    if encode is not None:
        folder.mkdir(parents=True, exist_ok=True)
    found: list[Placed] = []
    for number, example in enumerate(examples):
        try:
            source, placement = placer.read(example)
        except (InputError, OSError) as error:
            logger.warning("left out: %s", printable(error))
            continue
        files: list[Path] = []
        for mirrored in (False, True) if example.flip else (False,):
            file = folder / f"{_key(source.digest, placement, mirrored)}.npy"
            if encode is not None and not file.exists():
                _write(file, encode(placer.pixels(source, placement, mirrored)).numpy())
            files.append(file)
        found.append(Placed(example, placement, tuple(files), source.digest))
        if progress:
            progress(number + 1, len(examples))
    if not found:
        raise InputError(f"none of the {len(examples)} images can be read; see the messages above")
    return found


def _key(digest: str, placement: Placement, mirrored: bool) -> str:
    """A name for what is encoded: the image's content, how it is placed, and whether it is mirrored."""
    return hashlib.sha256(repr((digest, placement, mirrored)).encode()).hexdigest()[:32]


def _write(path: Path, values: np.ndarray) -> None:
    with written_whole(path, overwrite=True) as part, part.open("wb") as file:
        np.save(file, values.astype(np.float32))


@torch.no_grad()
def moments(autoencoder: AutoencoderKL, pixels: Tensor) -> Tensor:
    """Encodes one image [1, 3, H, W] in [-1, 1] as mean and standard deviation [2, C, h, w], on the CPU.

    Values that are not finite are an `InputError`: some autoencoders overflow in half precision.
    """
    first = next(autoencoder.parameters())
    posterior = autoencoder.encode(pixels.to(first.device, first.dtype))
    both = torch.cat([posterior.mean, posterior.std]).float().cpu()
    if not torch.isfinite(both).all():
        raise InputError(
            "its latents are not finite; use another autoencoder with --vae, or --precision full"
        )
    return both


def weights_key(tensors: Iterable[Tensor]) -> str:
    """Returns a short name for weights, by their bytes."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
