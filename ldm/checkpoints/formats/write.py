"""Writes tensors to a file: as safetensors one by one, or as `torch.save` does."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoints.formats.safetensors_file import DTYPES, HASH_ENTRY
from ldm.scaled import SCALE, round_weight

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_PIECE = 2**20  # numbers that are cast and written at a time


def write_safetensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    types: Mapping[str, torch.dtype] | None,
    metadata: Mapping[str, str],
    rounded: Collection[str] = (),
    aligned: int = 8,
) -> None:
    """Writes tensors in their `types` (None: their own), large types first as other writers do, and text metadata.

    Weights of the keys `rounded` become int8, each with its scales, see `ldm.scaled`. If `metadata` has
    `HASH_ENTRY`, its value becomes the SHA-256 of the tensors' bytes. The first one begins at a multiple of `aligned`
    bytes, itself one of 8. Tensors are cast piece by piece, without a second copy of one in memory. Raises `OSError`.
    """
    types = types_for(tensors) if types is None else types
    scales = {key + SCALE: round_weight(tensors[key])[1] for key in rounded}
    tensors = {**tensors, **scales}
    types = {**types, **types_for(scales), **dict.fromkeys(rounded, torch.int8)}
    order = data_order(tensors, types)
    entries: dict[str, Any] = {}
    end = 0
    for key in order:
        begin, end = end, end + tensors[key].numel() * types[key].itemsize
        entries[key] = {
            "dtype": _DTYPE_NAMES[types[key]],
            "shape": list(tensors[key].shape),
            "data_offsets": [begin, end],
        }
    sha = hashlib.sha256()
    with path.open("wb") as file:
        file.write(_header(entries, metadata, aligned))
        for key in order:
            value = round_weight(tensors[key])[0] if key in rounded else tensors[key].detach()
            for piece in torch.split(value.contiguous().reshape(-1), _PIECE):
                data = piece.to(types[key]).contiguous().view(torch.uint8).numpy().data
                sha.update(data)
                file.write(data)
        if HASH_ENTRY in metadata:
            file.seek(0)
            file.write(_header(entries, {**metadata, HASH_ENTRY: f"0x{sha.hexdigest()}"}, aligned))


def data_order(keys: Iterable[str], types: Mapping[str, torch.dtype]) -> list[str]:
    """Returns keys in the order of a file's tensors: large types first, then by name."""
    return sorted(keys, key=lambda key: (-types[key].itemsize, key))


def _header(entries: Mapping[str, Any], metadata: Mapping[str, str], aligned: int) -> bytes:
    text = json.dumps({"__metadata__": dict(metadata), **entries}, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % aligned)
    return len(text).to_bytes(8, "little") + text


def types_for(
    tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None, keep: Collection[str] = ()
) -> dict[str, torch.dtype]:
    """`dtype` for each floating-point tensor that is not in `keep`, and the others' own types; all if it is None."""
    return {
        key: dtype if dtype is not None and tensor.is_floating_point() and key not in keep else tensor.dtype
        for key, tensor in tensors.items()
    }


def write_torch(path: Path, value: Any) -> None:
    """`torch.save`, which answers a write that fails with a RuntimeError of its own: here it is the `OSError`."""
    with path.open("wb") as file:
        try:
            torch.save(value, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
