"""Products of 8-bit numbers on the CPU: the functions of `kernels.py` with rounded weights and inputs.

A weight is rounded to 255 levels, with one scale for each output channel; an input to 255 between its least and its
greatest value, with 0 among them (Krishnamoorthi 2018, "Quantizing deep convolutional networks for efficient
inference", sections 2.1 and 3). Sums are exact; results and what is added to them are bf16 or float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ldm.runtime import kernels, native
from ldm.scaled import round_weight

LEVELS = 254  # between the least and the greatest input; one is left for the rounding of the zero point
PIECE = 2**16  # values rounded at a time for each thread, so that they never leave its cache
_SILU_LEAST = -0.27846455  # of x * sigmoid(x), at x = -1.2784645
_TO_WHOLE = 1.5 * 2.0**23  # added to a small float32, it leaves a whole number in the lowest bits


class Packed(NamedTuple):
    """A weight for the kernels, its scale and zero point for each output channel, and the dtype of results."""

    weight: Tensor
    scale: Tensor
    zero: Tensor
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Rounded:
    """An input as bytes: value = scale * (byte - zero)."""

    bytes: Tensor
    scale: float
    zero: int

    @property
    def shape(self) -> torch.Size:
        return self.bytes.shape


@cache
def unsupported() -> str:
    """Returns why this machine cannot multiply 8-bit numbers fast; empty if it can."""
    needed = ("qconv2d_pointwise", "qconv_prepack", "qlinear_pointwise", "qlinear_prepack")
    if not torch.backends.mkldnn.is_available() or not all(hasattr(torch.ops.onednn, n) for n in needed):
        return "this build of torch has no kernels for 8-bit numbers"
    if not torch.cpu._is_vnni_supported():  # pyright: ignore[reportPrivateUsage]
        return "this CPU has no instructions for 8-bit products (AVX512-VNNI)"
    return ""


# --- inputs -----------------------------------------------------------------------------------------------------


def as_input(x: Tensor | Rounded, dtype: torch.dtype = torch.float32) -> Rounded:
    """Rounds x to bytes, unless it is rounded."""
    return x if isinstance(x, Rounded) else _rounded(x)


def silu(x: Tensor) -> Rounded:
    """Rounds the SiLU of x to bytes, in one pass."""
    return _rounded(x, silu=True)


def _rounded(x: Tensor, silu: bool = False) -> Rounded:
    flat = (x.permute(0, 2, 3, 1) if x.dim() == 4 else x).reshape(-1)  # a view of channels-last memory
    fast = native.can_round(flat)
    low, high = native.extremes(flat) if fast else (float(value) for value in flat.aminmax())
    if silu:
        low = _SILU_LEAST if low < 0 else 0.0
        high = high / (1 + math.exp(-high)) if high > 0 else 0.0
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / LEVELS or 1.0
    zero = round(-low / scale) if math.isfinite(scale) else 0
    out = torch.empty(flat.shape, dtype=torch.uint8)
    write = native.to_bytes if fast else _to_bytes
    write(flat, 1 / scale, _TO_WHOLE + zero, silu, out)
    if x.dim() == 4:
        n, c, h, w = x.shape
        return Rounded(out.view(n, h, w, c).permute(0, 3, 1, 2), scale, zero)
    return Rounded(out.view(x.shape), scale, zero)


def _to_bytes(x: Tensor, by: float, offset: float, silu: bool, out: Tensor) -> None:
    """Does what `native.to_bytes` does, in pieces."""
    piece = PIECE * torch.get_num_threads()
    values = torch.empty(min(piece, len(x)))
    for start in range(0, len(x), piece):
        part = x[start : start + piece]
        some = values[: len(part)].copy_(part)
        if silu:
            F.silu(some, inplace=True)
        torch.add(torch.tensor(offset), some, alpha=by, out=some)
        out[start : start + piece].copy_(some.view(torch.int32))  # keeps the lowest byte


# --- weights ----------------------------------------------------------------------------------------------------


def pack_convolution(
    weight: Tensor, dtype: torch.dtype, stride: Sequence[int], padding: Sequence[int], size: Sequence[int]
) -> Packed:
    """Packs a convolution's weight [out, in, kh, kw] for `convolve` on maps of about `size` [N, C, H, W]."""
    small, scale = round_weight(weight)
    packed = torch.ops.onednn.qconv_prepack(small, scale, 1.0, 128, stride, padding, [1, 1], 1, size)
    return Packed(packed, scale, torch.zeros(len(scale), dtype=torch.int32), dtype)


def pack_linear(weight: Tensor, dtype: torch.dtype) -> Packed:
    """Packs a matrix [out, in] for `multiply`."""
    small, scale = round_weight(weight)
    packed = torch.ops.onednn.qlinear_prepack(small.contiguous(), None)
    return Packed(packed, scale, torch.zeros(len(scale), dtype=torch.int32), dtype)


# --- products ---------------------------------------------------------------------------------------------------


def convolve(
    x: Tensor | Rounded,
    packed: Packed,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    add: Tensor | None = None,
) -> Tensor:
    """Returns the convolution of x, plus `add`, rounded once."""
    x = as_input(x)
    weight, scale, zero, dtype = packed
    maps = x.bytes.contiguous(memory_format=torch.channels_last)
    given = maps, x.scale, x.zero, weight, scale, zero
    shape = bias, stride, padding, [1, 1], 1, 1.0, 0, dtype
    if add is None:
        return torch.ops.onednn.qconv2d_pointwise.default(*given, *shape, "none", [], "")
    out = add.to(dtype).contiguous(memory_format=torch.channels_last)
    out = out.clone() if out is add else out  # the kernel adds in place
    return torch.ops.onednn.qconv2d_pointwise.binary(*given, out, *shape, 1.0, 0, "sum", 1.0, None, [], "")


def convolve_doubled(x: Tensor | Rounded, packed: Sequence[Packed], bias: Tensor | None) -> Tensor:
    """Convolves x at twice its size, see `kernels.convolve_doubled`."""
    return kernels.convolve_doubled(as_input(x), packed, bias, convolve)


def multiply(
    x: Tensor | Rounded,
    packed: Packed,
    bias: Tensor | None,
    add: Tensor | None = None,
    times: Tensor | None = None,
    gelu: bool = False,
) -> Tensor:
    """Returns x [..., in] times the matrix, plus bias; then GELU, or plus `add`, or times `times`."""
    x = as_input(x)
    weight, scale, zero, dtype = packed
    given = x.bytes, x.scale, x.zero, weight, scale, zero
    if add is not None:
        return torch.ops.onednn.qlinear_pointwise.binary(
            *given, add.to(dtype), bias, 1.0, 0, dtype, 1.0, 0, "add", 1.0, "none", [], ""
        )
    out = torch.ops.onednn.qlinear_pointwise.default(
        *given, bias, 1.0, 0, dtype, "gelu" if gelu else "none", [], "none"
    )
    return out if times is None else out.mul_(times)
