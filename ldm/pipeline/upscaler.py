"""Networks of the ESRGAN family that enlarge images, by the package spandrel, which knows their architectures."""

from __future__ import annotations

from copy import deepcopy
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.checkpoints.formats.detect import reading
from ldm.checkpoints.formats.read import read_tree
from ldm.images.pixels import from_uint8
from ldm.runtime.estimate import count_work
from ldm.runtime.tiling import decode_in_tiles
from ldm.util import InputError, printable

_TILE, _OVERLAP = 192, 32  # pixels: overlaps are wider than what a network of 23 blocks sees most of
_INSTALL = "pip install spandrel torchvision, of the same release and kind (CPU or CUDA) as torch"


class Upscaler:
    """Enlarges images `scale` times each way, in float32 and in overlapping tiles."""

    def __init__(self, descriptor: Any) -> None:
        self._network, self.scale = descriptor, int(descriptor.scale)

    @property
    def weight_bytes(self) -> int:
        """The bytes of its weights."""
        return 4 * sum(parameter.numel() for parameter in self._network.model.parameters())

    def needed_memory(self, size: tuple[int, int]) -> int:
        """The bytes that it computes at a time for an image of this height and width: of a tile, and the results."""
        network, (height, width) = deepcopy(self._network.model).to("meta"), size
        tile = torch.zeros(1, 3, min(height, _TILE), min(width, _TILE), device="meta")
        results = (
            3 * 3 * self.scale**2 * height * width
        )  # the sum of its tiles, and two more while it is clamped
        return 4 * (count_work(lambda: network(tile)).alive + results)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """Images [N, 3, H, W] in [-1, 1] to [N, 3, scale * H, scale * W] in [-1, 1], on their device."""
        self._network.to(images.device)
        unit = (images.float() + 1) / 2
        enlarged = [
            decode_in_tiles(self._network, one, self.scale, _TILE, _OVERLAP) for one in torch.split(unit, 1)
        ]
        return torch.cat(enlarged).clamp(0, 1) * 2 - 1

    def enlarge(self, pixels: np.ndarray, device: torch.device) -> np.ndarray:
        """An image uint8 [H, W, 3] to [scale * H, scale * W, 3], rounded."""
        made = self(from_uint8(pixels[None]).to(device))
        values = ((made + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return values[0].permute(1, 2, 0).cpu().numpy()


@lru_cache(maxsize=1)
def load_upscaler(path: str) -> Upscaler:
    """The network in a file; `InputError` for another one, and where spandrel cannot be used.

    The file is read by this toolkit, which runs nothing in it; spandrel gets its tensors.
    """
    try:
        spandrel: Any = import_module("spandrel")
    except ImportError as error:
        raise InputError(
            f"--upscaler needs the package {error.name or 'spandrel'}, which is not installed: {_INSTALL}"
        ) from None
    except RuntimeError as error:  # of a torchvision that was built for another torch
        raise InputError(
            f"--upscaler: spandrel cannot be used ({printable(error)[:100]}): {_INSTALL}"
        ) from error
    tree: Any = read_tree(Path(path))
    with reading(path):
        try:
            found = spandrel.ModelLoader().load_from_state_dict(tree)
        except spandrel.UnsupportedModelError:
            raise InputError(
                "is not a network that spandrel knows; give one that enlarges images, as ESRGAN"
            ) from None
        is_upscaler = isinstance(found, spandrel.ImageModelDescriptor) and found.scale > 1
        if not is_upscaler or (found.input_channels, found.output_channels) != (3, 3):
            raise InputError(
                f"is {found.architecture.name}, which does not enlarge colour images; give another"
            )
    return Upscaler(found.eval())
