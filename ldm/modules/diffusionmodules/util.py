"""Small building blocks that the U-Net and its extensions share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import checkpoint as checkpointing

from ldm.util import get_obj_from_str
from ldm.util import mean_flat as mean_flat

# names that the original had here and this package has with the samplers; no module of this folder uses them
_ELSEWHERE = {
    name: f"ldm.models.diffusion.schedule.{name}"
    for name in ("make_beta_schedule", "make_ddim_timesteps", "make_ddim_sampling_parameters")
}


def __getattr__(name: str) -> Any:
    """Returns objects of other modules under the names by which extensions of the original import them from here."""
    if name not in _ELSEWHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return get_obj_from_str(_ELSEWHERE[name])


def timestep_embedding(
    timesteps: Tensor, dim: int, max_period: float = 10000, repeat_only: bool = False
) -> Tensor:
    """Returns sinusoidal features of (possibly fractional) timesteps: [N] -> [N, dim], cosines first, in float32.

    Frequencies fall geometrically from 1 to 1/max_period ("Attention Is All You Need", section 3.5).
    `repeat_only` returns the timestep itself in every column.
    """
    if repeat_only:
        return timesteps[:, None].repeat(1, dim)
    half = dim // 2
    positions = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    angles = timesteps[:, None].float() * torch.exp(-math.log(max_period) / half * positions)
    embedding = torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)
    return nn.functional.pad(embedding, (0, dim % 2))


def guidance_embedding(weights: Tensor, dim: int) -> Tensor:
    """Returns sinusoidal features of guidance weights w: [N] -> [N, dim], sines first, in float32.

    w is scale - 1; the angles are 1000 w at frequencies that fall geometrically from 1 to 1/10000 (LCM, Luo et al.
    2023).
    """
    half = dim // 2
    positions = torch.arange(half, dtype=torch.float32, device=weights.device)
    angles = 1000 * weights[:, None].float() * torch.exp(-math.log(10000) / (half - 1) * positions)
    embedding = torch.cat([torch.sin(angles), torch.cos(angles)], dim=-1)
    return nn.functional.pad(embedding, (0, dim % 2))


def extract_into_tensor(a: Tensor, t: Tensor, x_shape: Sequence[int]) -> Tensor:
    """Returns a table's values at timesteps t [N], shaped [N, 1, ...] to multiply a batch of shape `x_shape`."""
    return a[t].reshape(-1, *[1] * (len(x_shape) - 1))


def noise_like(shape: Sequence[int], device: torch.device | str, repeat: bool = False) -> Tensor:
    """Draws normal numbers of the device's global generator; with `repeat` all entries of the batch have the same."""
    if repeat:
        return torch.randn((1, *shape[1:]), device=device).expand(tuple(shape))
    return torch.randn(tuple(shape), device=device)


def conv_nd(dims: int, *args: Any, **kwargs: Any) -> nn.Module:
    """Returns a convolution over `dims` (1, 2 or 3) axes, with the arguments of torch's."""
    return _of_axes({1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}, dims)(*args, **kwargs)


def avg_pool_nd(dims: int, *args: Any, **kwargs: Any) -> nn.Module:
    """Returns average pooling over `dims` (1, 2 or 3) axes, with the arguments of torch's."""
    return _of_axes({1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}, dims)(*args, **kwargs)


def _of_axes(kinds: Mapping[int, Callable[..., nn.Module]], dims: int) -> Callable[..., nn.Module]:
    if dims not in kinds:
        raise ValueError(f"unsupported number of dimensions: {dims}; it is 1, 2 or 3")
    return kinds[dims]


def linear(*args: Any, **kwargs: Any) -> nn.Linear:
    """Returns a fully connected layer, with the arguments of torch's."""
    return nn.Linear(*args, **kwargs)


GroupNorm32 = nn.GroupNorm  # whose kernels keep statistics in float32 for half-precision input


def normalization(channels: int, num_groups: int = 32) -> nn.GroupNorm:
    """Returns the U-Net's norm, eps 1e-5."""
    return GroupNorm32(num_groups, channels)


def zero_module(module: nn.Module) -> nn.Module:
    """Sets all parameters of `module` to zero, so that a residual block starts as the identity; returns it."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


def checkpoint(
    func: Callable[..., Tensor], inputs: Sequence[object], params: Iterable[object], flag: bool
) -> Tensor:
    """Returns `func(*inputs)`; with `flag` its activations are recomputed in the backward pass instead of kept.

    `params` is part of the published signature; autograd finds the parameters itself.
    """
    if flag and torch.is_grad_enabled():
        return checkpointing.checkpoint(func, *inputs, use_reentrant=False)  # type: ignore[return-value]
    return func(*inputs)
