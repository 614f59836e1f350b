"""Products of 8-bit numbers on the CPU: the functions of `kernels.py` with rounded weights and inputs.

A weight is rounded to 255 levels, with one scale for each output channel; an input to 255 between its least and its
greatest value, with 0 among them (Krishnamoorthi 2018, "Quantizing deep convolutional networks for efficient
inference", sections 2.1 and 3). Sums are exact; results and what is added to them are bf16 or float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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
    """A weight for the kernels, the scale and the sum of each output channel, and the dtype of results."""

    weight: Tensor
    scale: Tensor
    sum: Tensor
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Rounded:
    """An input as bytes: value = scale * (byte - zero). A map may have a margin of zeros: a padding."""

    bytes: Tensor
    scale: float
    zero: int
    margin: tuple[int, int] = (0, 0)

    @property
    def shape(self) -> torch.Size:
        """The shape without the margin."""
        shape = self.bytes.shape
        return torch.Size([*shape[:-2], *(n - 2 * m for n, m in zip(shape[-2:], self.margin, strict=True))])


@dataclass(frozen=True, slots=True)
class Silu:
    """A map, of whose SiLU the convolution after it will make bytes, with the margin that it needs."""

    x: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.x.shape


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


def as_input(
    x: Tensor | Silu | Rounded, dtype: torch.dtype = torch.float32, margin: tuple[int, int] = (0, 0)
) -> Rounded:
    """Rounds x, or its SiLU, to bytes, in one pass; what is rounded stays as it is."""
    if isinstance(x, Rounded):
        assert x.margin == margin
        return x
    return _rounded(x.x, margin, True) if isinstance(x, Silu) else _rounded(x, margin)


def norm_silu(norm: Callable[..., Tensor], x: Tensor) -> Silu:
    """Returns norm(x), marked as the input of a SiLU, see `as_input`."""
    return Silu(norm(x))


def _rounded(x: Tensor, margin: tuple[int, int], silu: bool = False) -> Rounded:
    rows = (x.permute(0, 2, 3, 1) if x.dim() == 4 else x).contiguous()  # a view of channels-last memory
    fast = native.can_round(rows)
    low, high = native.extremes(rows) if fast else (float(value) for value in rows.aminmax())
    if silu:
        low = low if low == -math.inf else _SILU_LEAST if low < 0 else 0.0  # what is not finite stays visible
        high = 0.0 if high <= 0 else high / (1 + math.exp(-high))
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / LEVELS or 1.0
    zero = round(-low / scale) if math.isfinite(scale) else 0
    out, inner = _surrounded(rows.shape, margin, zero)
    write = native.to_bytes if fast else _to_bytes
    write(rows, 1 / scale, _TO_WHOLE + zero, silu, inner)
    return Rounded(out.permute(0, 3, 1, 2) if x.dim() == 4 else out, scale, zero, margin)


def _surrounded(shape: torch.Size, margin: tuple[int, int], zero: int) -> tuple[Tensor, Tensor]:
    """Returns new bytes with a margin of `zero`s around maps [N, H, W, C], and the view without it."""
    if not any(margin):
        out = torch.empty(shape, dtype=torch.uint8)
        return out, out
    n, h, w, c = shape
    down, across = margin
    out = torch.empty((n, h + 2 * down, w + 2 * across, c), dtype=torch.uint8)
    for edge in (out[:, :down], out[:, down + h :], out[:, :, :across], out[:, :, across + w :]):
        edge.fill_(zero)
    return out, out[:, down : down + h, across : across + w]


def _to_bytes(x: Tensor, by: float, offset: float, silu: bool, out: Tensor) -> None:
    """Does what `native.to_bytes` does, in pieces."""
    flat = torch.empty(x.numel(), dtype=torch.uint8)
    parts = torch.split(x.view(-1), PIECE * torch.get_num_threads())
    values = torch.empty(len(parts[0]))
    for part, found in zip(parts, torch.split(flat, len(parts[0])), strict=True):
        some = values[: len(part)].copy_(part)
        if silu:
            F.silu(some, inplace=True)
        torch.add(torch.tensor(offset), some, alpha=by, out=some)
        found.copy_(some.view(torch.int32))  # keeps the lowest byte
    out.copy_(flat.view(x.shape))


# --- weights ----------------------------------------------------------------------------------------------------


def pack_convolution(
    weight: Tensor, dtype: torch.dtype, stride: Sequence[int], padding: Sequence[int], size: Sequence[int]
) -> Packed:
    """Packs a convolution's weight [out, in, kh, kw] for `convolve` on maps of about `size` [N, C, H, W]."""
    small, scale = round_weight(weight)
    size = [*size[:2], *(side + 2 * margin for side, margin in zip(size[2:], padding, strict=True))]
    packed = torch.ops.onednn.qconv_prepack(small, scale, 1.0, 0, stride, [0, 0], [1, 1], 1, size)
    return Packed(packed, scale, _sum(small, scale), dtype)


def pack_linear(weight: Tensor, dtype: torch.dtype) -> Packed:
    """Packs a matrix [out, in] for `multiply`."""
    small, scale = round_weight(weight)
    packed = torch.ops.onednn.qlinear_prepack(small.contiguous(), None)
    return Packed(packed, scale, _sum(small, scale), dtype)


def _sum(small: Tensor, scale: Tensor) -> Tensor:
    return small.flatten(1).sum(1, dtype=torch.int32) * scale


# --- products ---------------------------------------------------------------------------------------------------


def _without_zero(
    x: Rounded, packed: Packed, bias: Tensor | None
) -> tuple[Tensor, float, int, Tensor, Tensor, Tensor, Tensor]:
    """Returns the kernels' first arguments, and the bias with what the zero point of x adds to every sum.

    The kernels could be given the zero point, but would sum up the weights at every call.
    """
    added = -x.scale * x.zero
    shift = packed.sum * added if bias is None else torch.add(bias, packed.sum, alpha=added)
    no_zeros = torch.zeros(len(packed.scale), dtype=torch.int32)
    return x.bytes, x.scale, 0, packed.weight, packed.scale, no_zeros, shift


def convolve(
    x: Tensor | Silu | Rounded,
    packed: Packed,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    add: Tensor | None = None,
) -> Tensor:
    """Returns the convolution of x, plus `add`, rounded once."""
    down, across = padding
    *given, shift = _without_zero(as_input(x, margin=(down, across)), packed, bias)
    shape = shift, stride, [0, 0], [1, 1], 1, 1.0, 0, packed.dtype
    if add is None:
        return torch.ops.onednn.qconv2d_pointwise.default(*given, *shape, "none", [], "")
    out = add.to(packed.dtype).contiguous(memory_format=torch.channels_last)
    out = out.clone() if out is add else out  # the kernel adds in place
    return torch.ops.onednn.qconv2d_pointwise.binary(*given, out, *shape, 1.0, 0, "sum", 1.0, None, [], "")


def convolve_doubled(x: Tensor | Rounded, packed: Sequence[Packed], bias: Tensor | None) -> Tensor:
    """Convolves x at twice its size, see `kernels.convolve_doubled`."""
    return kernels.convolve_doubled(as_input(x, margin=(1, 1)), packed, bias, convolve)


def multiply(
    x: Tensor | Rounded,
    packed: Packed,
    bias: Tensor | None,
    add: Tensor | None = None,
    times: Tensor | None = None,
    gelu: bool = False,
) -> Tensor:
    """Returns x [..., in] times the matrix, plus bias; then GELU, or plus `add`, or times `times`."""
    *given, shift = _without_zero(as_input(x), packed, bias)
    dtype = packed.dtype
    if add is not None:
        return torch.ops.onednn.qlinear_pointwise.binary(
            *given, add.to(dtype), shift, 1.0, 0, dtype, 1.0, 0, "add", 1.0, "none", [], ""
        )
    out = torch.ops.onednn.qlinear_pointwise.default(
        *given, shift, 1.0, 0, dtype, "gelu" if gelu else "none", [], "none"
    )
    return out if times is None else out.mul_(times)
