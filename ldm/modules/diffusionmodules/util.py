"""Small building blocks that the U-Net and its extensions share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute


def timestep_embedding(
    timesteps: Tensor, dim: int, max_period: float = 10000, repeat_only: bool = False
) -> Tensor:
    """Sinusoidal features of (possibly fractional) timesteps: [N] -> [N, dim], cosines first, in float32.

    Frequencies fall geometrically from 1 to 1/max_period ("Attention Is All You Need", section 3.5).
    `repeat_only` gives the timestep itself in every column.
    """
    if repeat_only:
        return timesteps[:, None].repeat(1, dim)
    half = dim // 2
    positions = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    angles = timesteps[:, None].float() * torch.exp(-math.log(max_period) / half * positions)
    embedding = torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)
    return nn.functional.pad(embedding, (0, dim % 2))


def conv_nd(
    dims: int,
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    stride: int = 1,
    padding: int = 0,
    bias: bool = True,
) -> nn.Module:
    """A convolution over `dims` (1, 2 or 3) axes."""
    kinds = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
    if dims not in kinds:
        raise ValueError(f"unsupported number of dimensions: {dims}; it is 1, 2 or 3")
    return kinds[dims](in_channels, out_channels, kernel_size, stride=stride, padding=padding, bias=bias)


def linear(in_features: int, out_features: int, bias: bool = True) -> nn.Linear:
    """A fully connected layer."""
    return nn.Linear(in_features, out_features, bias=bias)


def normalization(channels: int, num_groups: int = 32) -> nn.GroupNorm:
    """The U-Net's norm, eps 1e-5. The kernels keep statistics in float32 for half-precision input."""
    return nn.GroupNorm(num_groups, channels)


def zero_module(module: nn.Module) -> nn.Module:
    """`module` with all parameters set to zero, so that a residual branch starts as the identity."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


def checkpoint(
    func: Callable[..., Tensor], inputs: Sequence[object], params: Iterable[object], flag: bool
) -> Tensor:
    """`func(*inputs)`; with `flag` its activations are recomputed in the backward pass instead of kept.

    `params` is part of the published signature; autograd finds the parameters itself.
    """
    if flag and torch.is_grad_enabled():
        return recompute(func, *inputs, use_reentrant=False)  # type: ignore[return-value]
    return func(*inputs)
