"""Trains a model to repaint: the U-Net also sees a mask, and the latent of the image without what is masked.

The first convolution of a model for text alone gets columns of zeros for the five new channels, so training begins
at the model that it was (as Stable Diffusion's inpainting model did).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ldm.finetuning.batches import Batch
from ldm.finetuning.latents import Placed
from ldm.finetuning.module import FineTuning
from ldm.models.diffusion.ddpm import LatentInpaintDiffusion
from ldm.models.diffusion.guidance import Conditioning
from ldm.models.keys import UNET_PREFIX

_FIRST = f"{UNET_PREFIX}input_blocks.0.0.weight"
WHOLE_SHARE = 0.25  # of the masks that cover everything, as the original's training had


def inpainting_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the config (`target`, `params`) of the inpainting model for that of a model for text."""
    own: dict[str, Any] = copy.deepcopy(dict(config))
    own["target"] = "ldm.models.diffusion.ddpm.LatentInpaintDiffusion"
    params = own["params"]
    params["conditioning_key"] = "hybrid"
    unet = params["unet_config"]["params"]
    unet["in_channels"] = 2 * unet["in_channels"] + 1
    return own


def widened(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the state of a model for text with zeros for the mask and the masked image's latent."""
    first = state_dict[_FIRST]
    zeros = first.new_zeros(len(first), first.shape[1] + 1, *first.shape[2:])
    return {**state_dict, _FIRST: torch.cat([first, zeros], dim=1)}


def random_mask(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Returns a mask of latent size, bool [h, w], True where the model repaints.

    A quarter of the masks cover everything; the others are one to four rectangles or thick strokes.
    """
    if rng.random() < WHOLE_SHARE:
        return np.ones((height, width), dtype=bool)
    mask = np.zeros((height, width), dtype=bool)
    rows, columns = np.mgrid[:height, :width]
    for _ in range(int(rng.integers(1, 5))):
        top, bottom = np.sort(rng.random(2)) * height
        left, right = np.sort(rng.random(2)) * width
        if rng.random() < 0.5:
            mask |= (rows >= top) & (rows <= bottom) & (columns >= left) & (columns <= right)
        else:
            mask |= _stroke(
                rows, columns, (top, left), (bottom, right), max(height, width) * rng.uniform(0.05, 0.2)
            )
    return mask


def _stroke(
    rows: np.ndarray, columns: np.ndarray, start: tuple[float, float], end: tuple[float, float], radius: float
) -> np.ndarray:
    """Returns which points are within `radius` of a line."""
    along = np.array(end) - np.array(start)
    points = np.stack([rows - start[0], columns - start[1]], axis=-1)
    share = np.clip(points @ along / max(float(along @ along), 1e-9), 0, 1)
    return np.linalg.norm(points - share[..., None] * along, axis=-1) <= radius


class InpaintingTuning(FineTuning):
    """Trains on random masks; the masked images are encoded in each step."""

    def conditioning(self, batch: Batch) -> Conditioning:
        context = self.prompts(batch.captions)
        masks, masked = zip(*map(self._masked, batch.images, batch.mirrored, self._seeds(batch)), strict=True)
        mask = torch.stack(masks).to(self.device)
        assert isinstance(self.model, LatentInpaintDiffusion)
        with torch.no_grad():
            pixels = torch.cat(masked).to(self.device)
            latent = self.model.get_first_stage_encoding(self.model.encode_first_stage(pixels).mode())
        return self.model.hybrid_conditioning(context, mask, latent.float())

    def _seeds(self, batch: Batch) -> list[list[int]]:
        """Seeds of the masks, which follow from the batch's own noise: a resumed run draws the same."""
        return [
            [self.settings.seed, *noise.flatten()[:2].view(torch.int32).tolist()] for noise in batch.noise
        ]

    def _masked(self, image: Placed, mirrored: int, seed: list[int]) -> tuple[Tensor, Tensor]:
        height, width = image.placement.size[::-1]
        factor = self.model.first_stage_model.downsampling
        rng = np.random.default_rng([abs(part) for part in seed])
        mask = torch.from_numpy(random_mask(height // factor, width // factor, rng)).float()[None]
        pixels = self.placer.pixels(self.placer.again(image), image.placement, bool(mirrored))
        hidden = F.interpolate(mask[None], size=(height, width), mode="nearest")
        return mask, pixels * (hidden < 0.5)
