"""Calls of the library that `setup.py` compiles of `native.c`; without it, torch's own operations do the same.

It is for Linux on x86-64 and optional: whoever lacks a compiler, or a CPU with AVX-512, has the same results but for
rounding, and waits longer. `LDM_NATIVE=off` leaves it alone.
"""

from __future__ import annotations

import ctypes
import math
import os
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ISA_LIMITS = "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"  # of the environment: the most that oneDNN may use
SWITCH = "LDM_NATIVE"  # "off" uses torch's operations only
LIBRARY = Path(__file__).with_name("libnative.so")
VERSION = 5  # as in native.c: a library that an older checkout has built is not used
MOST_WIDTH = 160  # of a head: with more, torch's products are faster

_pointer, _long, _int, _float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_ARGUMENTS = {
    "version": [],
    "has_wide_vectors": [],
    "has_tiles": [],
    "extremes": [_pointer, _int, _long, _pointer, _int],
    "to_bytes": [_pointer, _int, *[_long] * 3, _float, _float, _int, _pointer, *[_long] * 2, _int],
    "layer_norm": [_pointer, *[_long] * 2, _pointer, _pointer, _float, _pointer, _int],
    "group_norm": [_pointer, *[_long] * 4, _pointer, _pointer, _float, _int, _pointer, _int],
    "attend": [*[_pointer] * 4, *[_long] * 4, _int, _pointer, _float, _int],
}


@cache
def library() -> Any:
    """Returns the library; None if there is none for this machine, or the user wants none."""
    if os.environ.get(SWITCH) == "off" or not LIBRARY.is_file():
        return None
    try:
        # its threads are those of torch's OpenMP, whose names are found in the process
        found = ctypes.CDLL(str(LIBRARY))
        for name, arguments in _ARGUMENTS.items():
            getattr(found, name).argtypes = arguments
    except (OSError, AttributeError):
        return None
    return found if found.version() == VERSION and found.has_wide_vectors() else None


def can_round(x: Tensor) -> bool:
    """Returns whether `extremes` and `to_bytes` take x."""
    return x.dtype in (torch.bfloat16, torch.float32) and x.is_contiguous() and library() is not None


def extremes(x: Tensor) -> tuple[float, float]:
    """Returns the least and the greatest value of x, NaN if it contains one."""
    found = (ctypes.c_float * 2)()
    library().extremes(x.data_ptr(), x.dtype is torch.bfloat16, x.numel(), found, torch.get_num_threads())
    return found[0], found[1]


def to_bytes(x: Tensor, by: float, offset: float, silu: bool, out: Tensor) -> None:
    """Writes to the bytes `out` the lowest byte of the bits of offset + by * x; with `silu`, of the SiLU of x.

    x is contiguous, and `out` has its shape; maps [N, H, W, C] may be written into larger ones.
    """
    images, rows = x.shape[:2] if x.dim() == 4 else (1, x.numel() // x.shape[-1])
    strides = out.stride()[:2] if x.dim() == 4 else (0, x.shape[-1])
    library().to_bytes(
        *(x.data_ptr(), x.dtype is torch.bfloat16, images, rows, x.numel() // (images * rows)),
        *(by, offset, silu, out.data_ptr(), *strides, torch.get_num_threads()),
    )


def can_normalise(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Returns whether `layer_norm` and, for maps [N, H, W, C], `group_norm` take x."""
    affine = all(part is not None and _is_plain(part, x.shape[-1:]) for part in (weight, bias))
    return x.dtype is torch.bfloat16 and x.is_contiguous() and affine and library() is not None and has_bf16()


def _is_plain(part: Tensor, shape: torch.Size) -> bool:
    """Returns whether a parameter has this shape and its values, in float32, in memory: 8-bit ones compute theirs."""
    return (
        part.shape == shape and part.dtype is torch.float32 and part.is_contiguous() and part.data_ptr() != 0
    )


def has_bf16() -> bool:
    """Returns whether this CPU has vector instructions for bf16 (AVX512-BF16)."""
    return torch.cpu._is_avx512_bf16_supported()  # pyright: ignore[reportPrivateUsage]


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Normalises x [..., width] over its last dimension; weight and bias [width] are float32, and so are sums."""
    out, width = torch.empty_like(x), x.shape[-1]
    affine = weight.data_ptr(), bias.data_ptr(), eps
    library().layer_norm(
        x.data_ptr(), x.numel() // width, width, *affine, out.data_ptr(), torch.get_num_threads()
    )
    return out


def group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool) -> Tensor:
    """Normalises x [N, H, W, C] over groups of channels; with `silu`, returns the SiLU of that.

    Weight and bias [C] are float32, and so are all values in between. Raises MemoryError.
    """
    out, (images, height, width, channels) = torch.empty_like(x), x.shape
    given = x.data_ptr(), images, height * width, channels, groups, weight.data_ptr(), bias.data_ptr(), eps
    if library().group_norm(*given, silu, out.data_ptr(), torch.get_num_threads()):
        raise MemoryError("a group norm found no memory for its sums")
    return out


def can_attend(q: Tensor, heads: int) -> bool:
    """Returns whether `attend` takes q [batch, queries, heads * width], and this CPU has matrix units for it."""
    width = q.shape[-1] // heads
    return q.dtype is torch.bfloat16 and width % 2 == 0 and width <= MOST_WIDTH and _has_tiles()


def _has_tiles() -> bool:
    """Returns whether matrix units may be used: a limit of the user's for oneDNN holds here too."""
    limits = [os.environ.get(name, "ALL").upper() for name in ISA_LIMITS]
    allowed = all(limit in ("", "ALL", "DEFAULT") or "AMX" in limit for limit in limits)
    return allowed and library() is not None and _allowed_tiles()


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Computes attention of q [batch, queries, heads * width] on k and v [batch, keys, heads * width], in q's shape.

    Scores and sums are float32, weights bf16, as in torch's kernel for CPUs (Dao et al. 2022, "FlashAttention",
    algorithm 1). Raises MemoryError; ValueError for shapes that do not fit.
    """
    batch, queries, channels = q.shape
    if k.shape != v.shape or k.shape[-1] != channels or channels % heads:
        raise ValueError(
            f"no attention with {heads} heads of {list(q.shape)} on {list(k.shape)} and {list(v.shape)}"
        )
    q, k, v = (x.to(q.dtype).expand(batch, -1, -1) for x in (q, k, v))
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    width = channels // heads
    out = torch.empty(q.shape, dtype=q.dtype)
    if not out.numel():
        return out
    strides = (_long * 6)(*(n for x in (q, k, v) for n in x.stride()[:2]))
    failed = library().attend(
        *(x.data_ptr() for x in (q, k, v, out)),
        *(batch, heads, queries, k.shape[1], width),
        strides,
        width**-0.5 * math.log2(math.e),
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError("attention found no memory for its keys and values")
    return out


@cache
def _allowed_tiles() -> bool:
    """Asks the system for the use of matrix units, which Linux wants a process to do; False without such units."""
    return bool(library().has_tiles()) and torch.cpu._init_amx()  # pyright: ignore[reportPrivateUsage]
