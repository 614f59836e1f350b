"""Reads a checkpoint file of any supported kind into one flat mapping of names to tensors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ldm.checkpoints.legacy import read_torch_legacy
from ldm.checkpoints.pickle_reader import DTYPES
from ldm.checkpoints.recognise import looks_like
from ldm.checkpoints.safetensors_file import read_safetensors
from ldm.checkpoints.sniff import CheckpointError, Kind, open_regular, reading, sniff
from ldm.checkpoints.torch_zip import damaged_records, read_torch_zip

_WRAPPERS = ("state_dict", "model")
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_MAX_NESTING = 3

Scalar = int | float | str | bool


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint as its file holds it: names to strided CPU tensors of the file's own types.

    `metadata` has the scalars that stand beside the state dict (`global_step`, `epoch`, ...) or the text
    metadata of a safetensors file.
    """

    path: Path
    kind: Kind
    state_dict: Mapping[str, torch.Tensor]
    metadata: Mapping[str, Scalar] = field(default_factory=dict)


def read_checkpoint(path: str | os.PathLike[str], mmap: bool = True) -> Checkpoint:
    """Reads a `.ckpt` or `.safetensors` file, told apart by content, without running anything from it.

    With `mmap` the tensors are views on a private map of the file: nothing is read before it is used, and the
    file must stay as it is meanwhile. Without it the tensors are in memory (for network drives). Every fault
    of the file is a `CheckpointError` of one line.
    """
    with reading(path):
        tree, kind, metadata = _read_tree(path, mmap)
        state_dict = _find_state_dict(tree)
        _check_tensors(state_dict)
        return Checkpoint(Path(path), kind, state_dict, metadata)


def read_tree(path: str | os.PathLike[str], mmap: bool = True) -> Any:
    """Everything a file holds, for files that are no models: dicts, lists, scalars, text and CPU tensors."""
    with reading(path):
        return _read_tree(path, mmap)[0]


def find_damage(path: str | os.PathLike[str]) -> list[str]:
    """The names of damaged parts: records whose CRC is wrong, else tensors that hold NaN or infinity.

    Reads the whole file. An empty list means that nothing was found; only the zip format has checksums.
    """
    with reading(path), open_regular(path) as file:
        if sniff(file) == "torch zip" and (damaged := damaged_records(file)):
            return damaged
    tensors = read_checkpoint(path).state_dict
    return [key for key, tensor in tensors.items() if not _is_finite(tensor)]


def _is_finite(tensor: torch.Tensor) -> bool:
    if tensor.dtype in _FLOAT8:
        tensor = tensor.float()
    return bool(torch.isfinite(tensor).all())


def _read_tree(path: str | os.PathLike[str], mmap: bool) -> tuple[Any, Kind, dict[str, Scalar]]:
    with open_regular(path) as file:
        kind = sniff(file)
        if kind == "safetensors":
            tensors, metadata = read_safetensors(file, mmap)
            return tensors, kind, dict(metadata)
        tree = read_torch_zip(file, mmap) if kind == "torch zip" else read_torch_legacy(file, mmap)
        return tree, kind, _scalars(tree)


def _scalars(tree: Any) -> dict[str, Scalar]:
    if not isinstance(tree, dict):
        return {}
    return {str(key): value for key, value in tree.items() if isinstance(value, (int, float, str, bool))}


def _find_state_dict(tree: Any) -> dict[str, torch.Tensor]:
    """The mapping of tensors: the whole file, or what is under `state_dict` or `model`, perhaps nested."""
    for _ in range(_MAX_NESTING):
        if not isinstance(tree, dict):
            raise CheckpointError(f"holds no state dict: found {_type_name(tree)} in its place")
        wrapper = next((name for name in _WRAPPERS if name in tree), None)
        if wrapper is None:
            break
        tree = tree[wrapper]
    if not isinstance(tree, dict) or not tree:
        raise CheckpointError(f"holds no tensors: found {_type_name(tree)} in place of a state dict")
    stray = next((key for key, value in tree.items() if type(value) is not torch.Tensor), None)
    if stray is not None or not all(isinstance(key, str) for key in tree):
        found = ", ".join(repr(str(key)[:60]) for key in list(tree)[:5])
        raise CheckpointError(
            f"holds no state dict: {str(stray)[:60]!r} is no tensor; it has {found}{looks_like(tree)}"
        )
    return tree


def _type_name(value: object) -> str:
    return {"NoneType": "None", "dict": "empty mapping"}.get(type(value).__name__, type(value).__name__)


def _check_tensors(state_dict: Mapping[str, torch.Tensor]) -> None:
    """For every format: only plain tensors of known types in CPU memory leave this module."""
    known = {*DTYPES.values(), *_FLOAT8}
    for key, tensor in state_dict.items():
        if tensor.layout is not torch.strided or tensor.device.type != "cpu" or tensor.dtype not in known:
            raise CheckpointError(f"tensor {key[:200]!r} is no plain CPU tensor of a known type")
