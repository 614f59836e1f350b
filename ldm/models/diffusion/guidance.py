"""Classifier-free guidance (Ho and Salimans 2022): joining conditionings, and the formula."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

# a tensor, a list of conditionings, or a dict of them, as LatentDiffusion.apply_model takes it
Conditioning = Any
T = TypeVar("T")


class Denoiser(Protocol):
    """What a sampler needs of a model: noise in x [N, ...] at timesteps t [N] under a conditioning."""

    def apply_model(self, x_noisy: Tensor, t: Tensor, cond: Conditioning) -> Tensor: ...


class ZeroDenoiser:
    """Predicts no noise: a sampler over it draws what it draws over a model with this schedule, and costs nothing."""

    def __init__(self, alphas_cumprod: Tensor) -> None:
        self.alphas_cumprod, self.num_timesteps = alphas_cumprod, len(alphas_cumprod)

    def apply_model(self, x_noisy: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return torch.zeros_like(x_noisy)


def join(first: T, second: T) -> T:
    """Two conditionings of one structure, concatenated along the batch axis."""
    if isinstance(first, dict):
        return {key: join(first[key], second[key]) for key in first}  # type: ignore[index, return-value]
    if isinstance(first, list | tuple):
        return [join(a, b) for a, b in zip(first, second, strict=True)]  # type: ignore[return-value, arg-type]
    return torch.cat([first, second])  # type: ignore[list-item, return-value]


@dataclass(frozen=True)
class Guidance:
    """What the noise is predicted under: a conditioning, and how far to move away from another one.

    With scale 1 or without `uncond` the model runs on `cond` alone, else on both as one batch. A scale of
    several numbers [N, 1, 1, 1] holds for one sample each.
    """

    cond: Conditioning
    uncond: Conditioning | None = None
    scale: float | Tensor = 1.0

    @cached_property
    def both(self) -> Conditioning:
        """The two as one batch, the same object at every step, so that what a model makes of it can be kept."""
        return join(self.uncond, self.cond)

    def noise(self, model: Denoiser, x: Tensor, t: Tensor) -> Tensor:
        """The noise in `x` [N, ...] at timesteps t [N], guided; in the dtype of `x`."""
        if self.uncond is None or (isinstance(self.scale, float | int) and self.scale == 1.0):
            return model.apply_model(x, t, self.cond).to(x.dtype)
        both = model.apply_model(torch.cat([x, x]), torch.cat([t, t]), self.both)
        without, with_ = both.to(x.dtype).chunk(2)
        return without + self.scale * (with_ - without)
