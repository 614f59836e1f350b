"""Matrix products on the CPU with packed weights and fused operations.

Everything here changes rounding only. Maps are [N, C, H, W] in channels-last memory; weights are cast and packed
once. The operations are oneDNN's, under the names by which torch's compiler calls them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ldm.runtime import native

# How many attention scores are computed at a time for each thread: 2 MB in bf16, so that they stay in its cache.
SCORES = 2**20


def can_pack(dtype: torch.dtype) -> bool:
    """Returns whether this build of torch has the kernels, and this CPU supports them for `dtype`."""
    available = torch.backends.mkldnn.is_available()
    return available and (dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported())


def has_matrix_units() -> bool:
    """Returns whether this CPU has AMX tiles."""
    return torch.cpu._is_amx_tile_supported()  # pyright: ignore[reportPrivateUsage]


def fast_bf16() -> bool:
    """Returns whether this CPU multiplies bf16 numbers faster than float32."""
    return (has_matrix_units() or native.has_bf16()) and can_pack(torch.bfloat16)


def as_input(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns x as `convolve` and `multiply` compute with it."""
    return x.to(dtype)


def norm_silu(norm: Callable[..., Tensor], x: Tensor) -> Tensor:
    """Returns the SiLU of norm(x); a norm that `computes_silu` does both."""
    return norm(x, silu=True) if getattr(norm, "computes_silu", False) else F.silu(norm(x), inplace=True)


def pack_convolution(
    weight: Tensor, dtype: torch.dtype, stride: Sequence[int], padding: Sequence[int], size: Sequence[int]
) -> Tensor:
    """Packs a convolution's weight [out, in, kh, kw] for `convolve` on maps of about `size` [N, C, H, W]."""
    weight = weight.detach().to(dtype)
    return torch.ops.mkldnn._reorder_convolution_weight.default(weight, padding, stride, [1, 1], 1, size)


def convolve(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    add: Tensor | None = None,
) -> Tensor:
    """Returns the convolution of x, plus `add`, rounded once."""
    x = x.to(packed.dtype).contiguous(memory_format=torch.channels_last)
    if add is None:
        return torch.ops.mkldnn._convolution_pointwise.default(
            x, packed, bias, padding, stride, [1, 1], 1, "none", [], ""
        )
    add = add.to(packed.dtype).contiguous(memory_format=torch.channels_last)
    return torch.ops.mkldnn._convolution_pointwise.binary(
        x, add, packed, _like(bias, packed), padding, stride, [1, 1], 1, "add", 1.0, None, [], None
    )


def pack_linear(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Packs a matrix [out, in] for `multiply`."""
    return torch.ops.mkldnn._reorder_linear_weight.default(weight.detach().to(dtype).contiguous(), None)


def multiply(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    add: Tensor | None = None,
    times: Tensor | None = None,
    gelu: bool = False,
) -> Tensor:
    """Returns x [..., in] times the matrix, plus bias; then GELU, or plus `add`, or times `times`; rounded once."""
    x = x.to(packed.dtype)
    if add is not None:
        return torch.ops.mkldnn._linear_pointwise.binary(
            x, add.to(packed.dtype), packed, _like(bias, packed), "add"
        )
    if times is not None:
        return torch.ops.mkldnn._linear_pointwise.binary(x, times, packed, _like(bias, packed), "mul")
    return torch.ops.mkldnn._linear_pointwise.default(x, packed, bias, "gelu" if gelu else "none", [], "none")


def _like(bias: Tensor | None, packed: Tensor) -> Tensor | None:
    """Returns the bias for a kernel with two inputs, which requires one dtype throughout."""
    return None if bias is None else bias.to(packed.dtype)


def parity_weights(weight: Tensor) -> list[Tensor]:
    """Splits a kernel [out, in, 3, 3] after a doubling of the size into four [out, in, 2, 2] for the small map.

    An output pixel sees two of the small map's rows and columns, one of them twice; which, depends on whether its row
    and column are even. So weights are added up beforehand, in float32, for pixels at an even row and column, an odd
    column, an odd row, and both odd.
    """

    def pairs(kernel: Tensor, axis: int) -> list[Tensor]:
        first, middle, last = kernel.unbind(axis)
        return [torch.stack([first, middle + last], axis), torch.stack([first + middle, last], axis)]

    return [kernel for rows in pairs(weight.detach().float(), 2) for kernel in pairs(rows, 3)]


def convolve_doubled(
    x: Any, packed: Sequence[Any], bias: Tensor | None, convolve: Callable[..., Tensor] = convolve
) -> Tensor:
    """Convolves x [N, C, h, w] at twice its size (nearest neighbour) with a 3x3 kernel as packed `parity_weights`."""
    n, _, h, w = x.shape
    out: Tensor | None = None
    for part, kernel in enumerate(packed):
        row, column = divmod(part, 2)
        y = convolve(x, kernel, bias, (1, 1), (1, 1))  # one row and one column more than each parity needs
        if out is None:
            size = n, y.shape[1], 2 * h, 2 * w
            out = torch.empty(size, dtype=y.dtype, memory_format=torch.channels_last)
        out[:, :, row::2, column::2] = y[:, :, row : row + h, column : column + w]
    assert out is not None
    return out


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Computes multi-head attention of q [B, N, heads * d] on k and v [B, M, heads * d] -> [B, N, heads * d].

    On CPUs that have matrix units, the library's kernel is the fastest for bf16, or torch's, as it is for float32
    everywhere. Without matrix units torch's multiplies bf16 numbers no faster than float32, products in slices do.
    """
    if native.can_attend(q, heads):
        return native.attend(q, k, v, heads)
    if q.dtype != torch.bfloat16 or has_matrix_units():
        q, k, v = (torch.unflatten(y, -1, (heads, -1)).transpose(1, 2) for y in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    return attend_in_slices(q, k, v, heads)


def attend_in_slices(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Computes `attend` with a few heads and rows of scores at a time, so that they never leave the cache."""
    batch, queries, width = q.shape
    d, keys = width // heads, k.shape[1]
    q, k, v = (
        torch.unflatten(y, -1, (heads, d)).transpose(1, 2).reshape(batch * heads, -1, d)
        for y in (q * d**-0.5, k, v)
    )
    k = k.transpose(1, 2)
    out = torch.empty_like(q)
    rows = min(queries, max(SCORES // keys, 1))
    group = torch.get_num_threads() * max(SCORES // (rows * keys), 1)
    for head in range(0, batch * heads, group):
        some = slice(head, head + group)
        for row in range(0, queries, rows):
            part = slice(row, row + rows)
            scores = torch.bmm(q[some, part], k[some])
            out[some, part] = torch.bmm(torch.softmax(scores, dim=-1), v[some])
    return out.view(batch, heads, queries, d).transpose(1, 2).flatten(2)
