"""Reads GGUF files, as stable-diffusion.cpp and ComfyUI-GGUF write them, in the types that hold a v1 model well.

The layout is that of ggml's `docs/gguf.md`, version 2 or 3, little-endian: a magic number, counts, entries (name,
type, value), tensor descriptions (name, sides from the innermost on, type, offset), then the aligned data.
"""

from __future__ import annotations

import struct
from typing import Any, BinaryIO

import torch

from ldm.checkpoints.formats.detect import CheckpointError
from ldm.checkpoints.formats.tensor_bytes import MAX_DIMENSIONS, MAX_TENSORS, FileBytes, bounded_product
from ldm.scaled import ScaledWeight
from ldm.util import is_list

_MAX_HEADER = 64 * 2**20  # bytes; that of a v1 model has 100 thousand, one with a tokenizer a few million
_LONGEST_TEXT = 2**20
_VALUES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _LIST = 8, 9
_PLAIN = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
_Q8_0, _BLOCK = 8, 32  # numbers in a block: 2 bytes of scale as float16, then one byte each
_OTHERS = {
    2: "q4_0", 3: "q4_1", 6: "q5_0", 7: "q5_1", 10: "q2_k", 11: "q3_k", 12: "q4_k", 13: "q5_k", 14: "q6_k",
}  # fmt: skip
_SHAPE = "comfy.gguf.orig_shape."  # before a tensor's name: the shape of one that was stored as a matrix


class _Header:
    """Takes values one after another from the start of a file."""

    def __init__(self, content: FileBytes) -> None:
        self._content = content
        self.place = 4

    def bytes(self, count: int) -> bytes:
        if self.place + count > _MAX_HEADER:
            raise CheckpointError(f"has a gguf header of more than {_MAX_HEADER} bytes; refused")
        taken = bytes(self._content.read(self.place, count))
        self.place += count
        return taken

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.bytes(struct.calcsize(code)))[0]

    def text(self) -> str:
        length = self.number("Q")
        if length > _LONGEST_TEXT:
            raise CheckpointError(f"has a text of {length} bytes in its header; refused")
        return self.bytes(length).decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind == _TEXT:
            return self.text()
        if kind == _LIST:
            inner, count = self.number("I"), self.number("Q")
            if inner == _LIST:
                raise CheckpointError("has lists of lists in its header; refused")
            return [self.value(inner) for _ in range(count)]  # ends with the header at the latest
        if kind not in _VALUES:
            raise CheckpointError(f"has an entry of the unknown type {kind} in its header")
        return self.number(_VALUES[kind])


def read_gguf(file: BinaryIO, use_mmap: bool) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors (on the CPU) and the entries of a file other than lists. Call it inside `reading`."""
    content = FileBytes(file, use_mmap)
    header = _Header(content)
    version = header.number("I")
    if version not in (2, 3):
        raise CheckpointError(f"is a gguf file of version {version}; this toolkit reads 2 and 3")
    count, entry_count = header.number("Q"), header.number("Q")
    if count > MAX_TENSORS or entry_count > MAX_TENSORS:
        raise CheckpointError(f"describes more than {MAX_TENSORS} tensors or entries")
    entries = {header.text(): header.value(header.number("I")) for _ in range(entry_count)}
    described = [_description(header) for _ in range(count)]
    alignment = entries.get("general.alignment", 32)
    if type(alignment) is not int or not 1 <= alignment <= 2**20:
        raise CheckpointError(f"has the alignment {str(alignment)[:50]}")
    start = -(-header.place // alignment) * alignment
    tensors: dict[str, torch.Tensor] = {}
    for name, shape, kind, offset in described:
        if name in tensors:
            raise CheckpointError(f"has two tensors for {name[:200]!r}")
        shape = _original(entries.get(_SHAPE + name), name, shape)
        tensors[name] = _tensor(content, start + offset, name, shape, kind)
    if not tensors:
        raise CheckpointError("holds no tensors")
    plain = (int, float, str, bool)
    return tensors, {key: value for key, value in entries.items() if isinstance(value, plain)}


def _description(header: _Header) -> tuple[str, list[int], int, int]:
    """Name, shape with the innermost side last, type and offset of a tensor."""
    name, dimensions = header.text(), header.number("I")
    if dimensions > MAX_DIMENSIONS:
        raise CheckpointError(f"tensor {name[:200]!r} has {dimensions} dimensions (at most {MAX_DIMENSIONS})")
    sides = [header.number("Q") for _ in range(dimensions)]
    return name, sides[::-1], header.number("I"), header.number("Q")


def _original(noted: Any, name: str, shape: list[int]) -> list[int]:
    """The shape of a tensor before it was stored as a matrix, if the file notes one."""
    if noted is None:
        return shape
    sides = [side for side in noted if type(side) is int and side >= 0] if is_list(noted) else []
    if not is_list(noted) or len(sides) != len(noted):
        raise CheckpointError(f"notes no valid shape for {name[:200]!r}")
    if bounded_product(sides) != bounded_product(shape):
        raise CheckpointError(f"notes the shape {noted} for {name[:200]!r}, which has {shape}")
    return sides


def _tensor(content: FileBytes, start: int, name: str, shape: list[int], kind: int) -> torch.Tensor:
    count = bounded_product(shape)
    if kind in _PLAIN:
        return content.tensor(start, count, _PLAIN[kind]).reshape(shape)
    if kind != _Q8_0:
        known = _OTHERS.get(kind, f"type {kind}")
        raise CheckpointError(
            f"has weights in {known} ({name[:100]!r}); this toolkit reads f32, f16, bf16 and q8_0"
        )
    if count % _BLOCK or not count:
        raise CheckpointError(f"tensor {name[:200]!r} of shape {shape} is not in whole blocks of {_BLOCK}")
    blocks, size = count // _BLOCK, _BLOCK + 2
    raw = content.tensor(start, blocks * size, torch.uint8).view(blocks, size)
    scale = raw.view(torch.float16)[:, 0]
    return ScaledWeight(raw.view(torch.int8)[:, 2:], scale, torch.Size(shape))
