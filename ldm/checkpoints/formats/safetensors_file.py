"""Reads safetensors files; the header is parsed here because the library lets a key occur twice."""

from __future__ import annotations

import json
from typing import BinaryIO, TypeGuard

import torch

from ldm.checkpoints.formats.detect import MAX_SAFETENSORS_HEADER, CheckpointError
from ldm.checkpoints.formats.tensor_bytes import MAX_DIMENSIONS, MAX_TENSORS, FileBytes, bounded_product
from ldm.json_value import Json, JsonObject, as_object

_MAX_HEADER_PARTS = 2_000_000  # of JSON; a tensor takes about 8, and a LoRA's list of tags one each

HASH_ENTRY = "modelspec.hash_sha256"  # of the metadata: the SHA-256 of the tensors' bytes, after "0x"

# by their names in a header
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def read_safetensors(file: BinaryIO, use_mmap: bool) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors (on the CPU) and the text metadata of a file. Call it inside `reading`."""
    content = FileBytes(file, use_mmap)
    header, data_start = read_header(content)
    noted = header.pop("__metadata__", {})
    metadata = {key: value for key, value in as_object(noted).items() if isinstance(value, str)}
    if metadata != noted:
        raise CheckpointError("has a __metadata__ that is not a mapping from text to text")
    if not header:
        raise CheckpointError("holds no tensors")
    if len(header) > MAX_TENSORS:
        raise CheckpointError(f"describes more than {MAX_TENSORS} tensors")
    entries = {key: _checked_entry(key, entry) for key, entry in header.items()}
    _check_layout(entries, content.size - data_start)
    tensors = {
        key: content.tensor(data_start + begin, bounded_product(shape), dtype).reshape(shape)
        for key, (dtype, shape, begin, _) in entries.items()
    }
    return tensors, metadata


def read_header(content: FileBytes) -> tuple[JsonObject, int]:
    """The JSON header, in which no key occurs twice, and the byte at which the data begin."""
    length = int.from_bytes(content.read(0, 8), "little")
    if length > MAX_SAFETENSORS_HEADER:
        raise CheckpointError(f"has a safetensors header of {length} bytes; at most {MAX_SAFETENSORS_HEADER}")
    raw = bytes(content.read(8, length))
    if sum(raw.count(mark) for mark in (b",", b"[", b"{")) > _MAX_HEADER_PARTS:
        raise CheckpointError(f"has a safetensors header of more than {_MAX_HEADER_PARTS} parts; refused")
    header: Json = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    if not isinstance(header, dict):
        raise CheckpointError("has a safetensors header that is not a mapping")
    return header, 8 + length


def _unique(pairs: list[tuple[str, Json]]) -> JsonObject:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        raise CheckpointError("has the same key twice in its header; refused")
    return mapping


def _checked_entry(key: str, entry: Json) -> tuple[torch.dtype, list[int], int, int]:
    """Data type, shape, first byte and end of a tensor, relative to the data, from its header entry."""
    name = repr(key[:200])
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"tensor {name} has a header entry that is not dtype, shape, data_offsets")
    dtype_name, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype_name, str) or dtype_name not in DTYPES:
        raise CheckpointError(f"tensor {name} has the unknown dtype {str(dtype_name)[:50]!r}")
    if not (_are_natural(shape) and _are_natural(offsets) and len(offsets) == 2):
        raise CheckpointError(f"tensor {name} has a shape or data_offsets that are not natural numbers")
    if len(shape) > MAX_DIMENSIONS:
        raise CheckpointError(f"tensor {name} has {len(shape)} dimensions (at most {MAX_DIMENSIONS})")
    dtype = DTYPES[dtype_name]
    needed = bounded_product(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != needed:
        raise CheckpointError(f"tensor {name} needs {needed} bytes, but data_offsets are {offsets}")
    return dtype, shape, offsets[0], offsets[1]


def _are_natural(numbers: Json) -> TypeGuard[list[int]]:
    return isinstance(numbers, list) and all(type(n) is int and n >= 0 for n in numbers)


def _check_layout(entries: dict[str, tuple[torch.dtype, list[int], int, int]], data_bytes: int) -> None:
    """Raises `CheckpointError` unless the tensors follow one another and fill the data exactly."""
    position = 0
    for key, (_, _, begin, end) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if begin != position:
            raise CheckpointError(
                f"tensor {key[:200]!r} begins at byte {begin} of the data, expected {position}"
            )
        position = end
    if position != data_bytes:
        problem = "is incomplete" if position > data_bytes else "has spare data"
        raise CheckpointError(f"{problem}: its tensors take {position} bytes, the file has {data_bytes}")
