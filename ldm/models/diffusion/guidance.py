"""Classifier-free guidance (Ho and Salimans 2022): joining conditionings, and the formula."""

from __future__ import annotations

from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

# a tensor, a list of conditionings, or a dict of them, as LatentDiffusion.apply_model takes it
Conditioning = Any
T = TypeVar("T")


class Denoiser(Protocol):
    """What a sampler needs of a model: noise in x [N, ...] at timesteps t [N] under a conditioning."""

    def apply_model(self, x_noisy: Tensor, t: Tensor, cond: Conditioning) -> Tensor: ...


def join(first: T, second: T) -> T:
    """Two conditionings of one structure, concatenated along the batch axis."""
    if isinstance(first, dict):
        return {key: join(first[key], second[key]) for key in first}  # type: ignore[index, return-value]
    if isinstance(first, list | tuple):
        return [join(a, b) for a, b in zip(first, second, strict=True)]  # type: ignore[return-value, arg-type]
    return torch.cat([first, second])  # type: ignore[list-item, return-value]


def guided_noise(
    model: Denoiser, x: Tensor, t: Tensor, cond: Conditioning, uncond: Conditioning | None, scale: float
) -> Tensor:
    """The noise in `x`, moved away from the unconditional prediction by `scale`; in the dtype of `x`.

    With scale 1 or without `uncond` the model runs on the conditioning alone, else on both as one batch.
    """
    if uncond is None or scale == 1.0:
        return model.apply_model(x, t, cond).to(x.dtype)
    both = model.apply_model(torch.cat([x, x]), torch.cat([t, t]), join(uncond, cond))
    without, with_ = both.to(x.dtype).chunk(2)
    return without + scale * (with_ - without)
