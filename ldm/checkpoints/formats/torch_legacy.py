"""Reads the format of `torch.save` before torch 1.6 (five pickles, then raw data), by the same rules."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import BinaryIO

import torch

from ldm.checkpoints.formats.detect import CheckpointError
from ldm.checkpoints.formats.pickle_reader import MAX_PICKLE_BYTES, build_tree, read_pickle
from ldm.checkpoints.formats.tensor_bytes import FileBytes, Storage, TensorSpec, Tree

_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
_PROTOCOL_VERSION = 1001
_COUNT_BYTES = 8


def read_torch_legacy(file: BinaryIO, use_mmap: bool) -> Tree:
    """The content of the file: dicts, lists, tuples, numbers, text and CPU tensors. Call it inside `reading`."""
    file.seek(0)
    start = io.BytesIO(file.read(MAX_PICKLE_BYTES))
    declared: dict[str, Storage] = {}
    magic, version = read_pickle(start), read_pickle(start)
    system: Tree = read_pickle(start)
    described = read_pickle(start, declared)
    keys = read_pickle(start)
    if magic != _MAGIC_NUMBER or version != _PROTOCOL_VERSION:
        raise CheckpointError("is of an unknown version of torch's old format")
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise CheckpointError("was saved on a big-endian machine; save it again as safetensors")
    storages = _storages(FileBytes(file, use_mmap), start.tell(), keys, declared)
    return build_tree(described, _tensor_maker(storages))


def _storages(
    content: FileBytes, position: int, keys: Tree, declared: dict[str, Storage]
) -> dict[str, torch.Tensor]:
    """The flat storages that follow the pickles in the order of `keys`, each after its number of elements."""
    names = [key for key in keys if isinstance(key, str)] if isinstance(keys, list) else None
    if names is None or names != keys:
        raise CheckpointError("has a list of records that is not a list of names")
    if len(names) != len(declared) or set(names) != set(declared):
        raise CheckpointError("does not hold exactly the records that its tensors need (unfilled storage)")
    storages: dict[str, torch.Tensor] = {}
    for key in names:
        storage = declared[key]
        count = int.from_bytes(content.read(position, _COUNT_BYTES), "little")
        if count != storage.count:
            raise CheckpointError(
                f"has {count} elements in record {key[:100]!r}, but declares {storage.count}"
            )
        storages[key] = content.tensor(position + _COUNT_BYTES, count, storage.dtype)
        position += _COUNT_BYTES + count * storage.dtype.itemsize
    if position != content.size:
        raise CheckpointError(f"has {content.size - position} bytes after its last record")
    return storages


def _tensor_maker(storages: dict[str, torch.Tensor]) -> Callable[[TensorSpec], torch.Tensor]:
    return lambda spec: spec.view(storages[spec.storage.key])
