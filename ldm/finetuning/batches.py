"""Which examples, noise and timesteps a step sees: a function of the seed and of the step's number alone.

So a run that is resumed sees what an unbroken one would have, and every device takes its own share of the batches.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ldm.finetuning.captions import caption_for
from ldm.finetuning.latents import Placed


class Batch(NamedTuple):
    """The inputs of one step, for B images of one size.

    latents: unscaled [B, C, h, w]; captions: B texts; t: timesteps [B]; noise [B, C, h, w]; weights: of each image's
    loss [B]; images: the examples, for objectives that need more of them; mirrored: 1 for each that is, else 0.
    """

    latents: Tensor
    captions: list[str]
    t: Tensor
    noise: Tensor
    weights: Tensor
    images: list[Placed]
    mirrored: list[int]


class Epochs:
    """Divides examples into batches: within an epoch each occurs as often as its repeats, with others of its size.

    The last batch of a size may be short. `seed` and the epoch's number determine order and grouping.
    """

    def __init__(self, examples: Sequence[Placed], batch_size: int, seed: int) -> None:
        self.examples, self.batch_size, self.seed = examples, batch_size, seed
        self._by_size: dict[tuple[int, int], list[int]] = {}
        for index, placed in enumerate(examples):
            self._by_size.setdefault(placed.placement.size, []).extend([index] * placed.example.repeats)
        self.batches = sum(-(-len(indices) // batch_size) for indices in self._by_size.values())
        self._of_epoch = functools.lru_cache(maxsize=2)(self._divided)

    def batch(self, number: int) -> list[Placed]:
        """Returns the examples of batch `number`, counted over all epochs."""
        epoch, position = divmod(number, self.batches)
        return [self.examples[index] for index in self._of_epoch(epoch)[position]]

    def _divided(self, epoch: int) -> list[list[int]]:
        rng = np.random.default_rng([self.seed, epoch])
        size = self.batch_size
        batches: list[list[int]] = [
            [indices[i] for i in order[start : start + size]]
            for indices in self._by_size.values()
            for order in [rng.permutation(len(indices)).tolist()]
            for start in range(0, len(order), size)
        ]
        return [batches[i] for i in rng.permutation(len(batches)).tolist()]


def batch_maker(
    epochs: Epochs, num_timesteps: int, noise_offset: float = 0.0, regular_weight: float = 1.0
) -> Callable[[int, np.random.Generator], Batch]:
    """Returns the function from a batch's number and generator to the batch.

    Latents are drawn from their distributions; timesteps are uniform (Ho et al. 2020, algorithm 1). `noise_offset`
    adds that much of one normal number for each image and channel to the noise, which teaches overall brightness
    (Guttenberg 2023). The loss of images of the class in general counts `regular_weight` (DreamBooth, equation 2).
    """

    def make(number: int, rng: np.random.Generator) -> Batch:
        images = epochs.batch(number)
        mirrored = [int(rng.integers(len(image.latents))) for image in images]
        moments = np.stack([np.load(image.latents[i]) for image, i in zip(images, mirrored, strict=True)])
        mean, std = np.moveaxis(moments, 1, 0)
        draw, noise = rng.standard_normal((2, *mean.shape), dtype=np.float32)
        t = rng.integers(num_timesteps, size=len(images))
        noise = noise + np.float32(noise_offset) * rng.standard_normal(
            (*mean.shape[:2], 1, 1), dtype=np.float32
        )
        return Batch(
            torch.from_numpy(mean + std * draw),
            [caption_for(image.example, rng) for image in images],
            torch.from_numpy(t),
            torch.from_numpy(noise),
            torch.tensor([regular_weight if image.example.regular else 1.0 for image in images]),
            images,
            mirrored,
        )

    return make
