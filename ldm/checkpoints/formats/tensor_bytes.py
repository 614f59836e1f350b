"""Byte ranges of a file as tensors: views on one private map of the file, or plain reads."""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeAlias

import torch

from ldm.checkpoints.formats.detect import CheckpointError, file_size
from ldm.scaled import ScaledWeight

# what a file can hold
Tree: TypeAlias = (
    "dict[Any, Tree] | list[Tree] | tuple[Tree, ...] | torch.Tensor | str | bytes | int | float | None"
)

MAX_DIMENSIONS = 8
MAX_TENSORS = 65_536  # of a file; a v1 training checkpoint with EMA and optimizer has about 3,500
_MAX_ELEMENTS = 2**48  # more than any disk holds

# types of 8 bits, and for each the smallest type in which torch computes that holds all of its values
FLOAT8 = {
    torch.float8_e4m3fn: torch.float16,
    torch.float8_e5m2: torch.float16,
    torch.float8_e4m3fnuz: torch.float16,
    torch.float8_e5m2fnuz: torch.float16,
    torch.float8_e8m0fnu: torch.bfloat16,  # powers of two from 2^-127 to 2^127
}


_maps: weakref.WeakKeyDictionary[mmap.mmap, int] = weakref.WeakKeyDictionary()  # and their addresses


def forget(tensor: torch.Tensor) -> None:
    """Lets the pages of a tensor that is a view of a mapped file leave memory; they are read again when needed.

    A tensor that was changed in place, or that is not such a view, keeps its memory.
    """
    if isinstance(tensor, ScaledWeight):
        tensor = tensor.whole
    if tensor.is_inference() or tensor._version or not tensor.is_contiguous() or os.name != "posix":
        return
    start = tensor.data_ptr()
    for mapped, address in _maps.items():
        offset = start - address
        if offset >= 0 and offset + tensor.nbytes <= len(mapped):
            first = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE
            whole = (offset + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - first
            if whole > 0:
                mapped.madvise(mmap.MADV_DONTNEED, first, whole)


class FileBytes:
    """Hands out byte ranges of an open file.

    With `use_mmap` they are views on one copy-on-write map, which lives as long as any tensor made from it
    and costs memory only for the pages that are touched. The file must not be truncated meanwhile: the
    operating system then kills the process (SIGBUS). Without it every range is read into memory of its own.
    """

    def __init__(self, file: BinaryIO, use_mmap: bool) -> None:
        self.size = file_size(file)
        self._file = file
        self._map = None
        if use_mmap:
            mapped = mmap.mmap(file.fileno(), self.size, access=mmap.ACCESS_COPY)
            _maps[mapped] = torch.frombuffer(mapped, dtype=torch.uint8).data_ptr()
            self._map = memoryview(mapped)

    def read(self, start: int, length: int) -> memoryview:
        """The bytes [start, start + length) as a writable buffer; `CheckpointError` outside of the file."""
        if not 0 <= start <= start + length <= self.size:
            raise CheckpointError(f"is incomplete: it ends at byte {self.size}, its data at {start + length}")
        if self._map is not None:
            return self._map[start : start + length]
        self._file.seek(start)
        data = memoryview(bytearray(self._file.read(length)))
        if len(data) != length:
            raise CheckpointError("became shorter while it was read")
        return data

    def tensor(self, start: int, count: int, dtype: torch.dtype) -> torch.Tensor:
        """A flat CPU tensor of `count` little-endian elements that begin at byte `start`."""
        if count == 0:
            return torch.empty(0, dtype=dtype)
        data = self.read(start, count * dtype.itemsize)
        flat = torch.frombuffer(data, dtype=dtype)
        if flat.data_ptr() % dtype.itemsize:
            flat = torch.frombuffer(bytearray(data), dtype=dtype)
        return flat


@dataclass(frozen=True, slots=True)
class Storage:
    """A run of `count` elements that a checkpoint keeps under the name `key`."""

    key: str
    dtype: torch.dtype
    count: int


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A strided view of a storage, as the file describes it; offset and strides count elements.

    `dtype` is the storage's own or, for a storage of bytes, a type of 8 bits.
    """

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def check(self) -> None:
        """Raises `CheckpointError` unless every element is in the storage and none is counted more than once."""
        size, stride, count = self.size, self.stride, self.storage.count
        if len(size) != len(stride) or len(size) > MAX_DIMENSIONS:
            raise CheckpointError(
                f"has {len(size)} sizes and {len(stride)} strides (at most {MAX_DIMENSIONS})"
            )
        if not all(type(n) is int and n >= 0 for n in (self.offset, *size, *stride)):
            raise CheckpointError("has a size, stride or offset that is not a natural number")
        elements = bounded_product(size)
        last = (
            self.offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if elements else 0
        )
        if elements > count or self.offset > count or (elements and last >= count):
            raise CheckpointError(
                f"of shape {list(size)} with strides {list(stride)} at {self.offset} "
                f"does not fit its record of {count} elements"
            )

    def view(self, flat: torch.Tensor) -> torch.Tensor:
        """The tensor, of the flat elements of its storage."""
        return flat.view(self.dtype).as_strided(self.size, self.stride, self.offset)


def bounded_product(sizes: Sequence[int]) -> int:
    """The number of elements of a shape; `CheckpointError` if it is 2^48 or more, not counting sizes of 0.

    So a tensor without elements cannot have sizes that a tensor with elements could not have.
    """
    total = 1
    for n in sizes:
        total *= n or 1
        if total >= _MAX_ELEMENTS:
            raise CheckpointError(f"has a shape with too many elements: {list(sizes)}")
    return 0 if 0 in sizes else total
