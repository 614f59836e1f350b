"""Reads a checkpoint file of any supported format into one flat mapping of names to tensors."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from ldm.checkpoints.formats.detect import CheckpointError, Format, open_regular, reading, sniff
from ldm.checkpoints.formats.embedding_image import is_png, read_png_embedding
from ldm.checkpoints.formats.gguf_file import read_gguf
from ldm.checkpoints.formats.pickle_reader import DTYPES
from ldm.checkpoints.formats.safetensors_file import read_safetensors
from ldm.checkpoints.formats.tensor_bytes import FLOAT8, Tree
from ldm.checkpoints.formats.torch_legacy import read_torch_legacy
from ldm.checkpoints.formats.torch_zip import damaged_records, read_torch_zip
from ldm.checkpoints.layouts.prediction import Prediction
from ldm.checkpoints.layouts.recognise import ModelKind, kind_of, looks_like
from ldm.json_value import JsonObject
from ldm.scaled import ScaledWeight, joined

_WRAPPERS = ("state_dict", "model")
_WRAPPING_MODULES = re.compile(r"^((module|_orig_mod)\.)+|(?<=\.)_orig_mod\.")
_MAX_NESTING = 3
_SECTIONS = {"image_proj", "ip_adapter"}  # the state dicts in one of an IP-Adapter
_DESCRIPTIONS = ("hyper_parameters", "metadata", "__metadata__")  # mappings next to the state dict

Scalar = int | float | str | bool


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as its file holds it: names to strided CPU tensors of the file's own types.

    `metadata` has the scalars next to the state dict (`global_step`, `epoch`, ...) or the text metadata of a
    safetensors file. For a diffusers folder `configs` has the settings of its components (`unet/config.json` and so
    on) and `vocabulary` the folder of its tokenizer. `prediction` is what `read_model` found about its prediction
    type.
    """

    path: Path
    format: Format
    state_dict: Mapping[str, torch.Tensor]
    metadata: Mapping[str, Scalar] = field(default_factory=dict[str, Scalar])
    configs: Mapping[str, JsonObject] = field(default_factory=dict[str, JsonObject])
    vocabulary: Path | None = None
    prediction: Prediction = field(default_factory=Prediction)

    @cached_property
    def kind(self) -> ModelKind:
        """The kind of model that the state dict is of, by its keys and shapes."""
        return kind_of(self.state_dict)


def read_checkpoint(path: str | os.PathLike[str], mmap: bool = True) -> Checkpoint:
    """Reads a `.ckpt`, `.safetensors` or `.gguf` file, distinguished by content, without running anything in it.

    With `mmap` the tensors are views on a private map of the file: nothing is read before it is used, and the
    file must stay as it is meanwhile. Without it the tensors are in memory (for network drives). Every fault
    of the file is a `CheckpointError` of one line.
    """
    with reading(path):
        tree, found, metadata = _read_tree(path, mmap)
        state_dict = _unwrapped(_find_state_dict(tree))
        _check_tensors(state_dict)
        try:
            return Checkpoint(Path(path), found, joined(state_dict), metadata)
        except ValueError as error:
            raise CheckpointError(f"cannot be used: {error}") from None


def read_tree(path: str | os.PathLike[str], mmap: bool = True) -> Tree:
    """Everything a file holds, for files that are not models: dicts, lists, scalars, text and CPU tensors.

    Of a PNG image that is the textual inversion in its texts.
    """
    with reading(path):
        with open_regular(path) as file:
            if is_png(file):
                return read_png_embedding(file)
        return _read_tree(path, mmap)[0]


def find_damaged_records(path: str | os.PathLike[str]) -> list[str]:
    """The names of the records of a zip file whose bytes do not have their CRC; other formats have none.

    Reads the whole file.
    """
    with reading(path), open_regular(path) as file:
        return damaged_records(file) if not is_png(file) and sniff(file) == "torch zip" else []


def find_not_finite(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """The keys of the tensors that hold NaN or infinity."""
    return [key for key, tensor in tensors.items() if not _is_finite(tensor)]


def _is_finite(tensor: torch.Tensor) -> bool:
    if not tensor.is_floating_point():
        return True
    if tensor.dtype in FLOAT8:
        tensor = tensor.float()
    total = tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32))
    return bool(torch.isfinite(total) or torch.isfinite(tensor).all())  # sums are quick, but may overflow


def _read_tree(path: str | os.PathLike[str], mmap: bool) -> tuple[Tree, Format, dict[str, Scalar]]:
    with open_regular(path) as file:
        found = sniff(file)
        if found == "safetensors":
            tensors, metadata = read_safetensors(file, mmap)
            return {**tensors}, found, {**metadata}
        if found == "gguf":
            weights, entries = read_gguf(file, mmap)
            return {**weights}, found, entries
        tree = read_torch_zip(file, mmap) if found == "torch zip" else read_torch_legacy(file, mmap)
        return tree, found, _scalars(tree)


def _scalars(tree: Tree) -> dict[str, Scalar]:
    if not isinstance(tree, dict):
        return {}
    within = [(name, inner) for name in _DESCRIPTIONS if isinstance(inner := tree.get(name), dict)]
    plain = {f"{name}: {key}": _plain(value) for name, inner in within for key, value in inner.items()}
    plain |= {str(key): _plain(value) for key, value in tree.items()}
    return {key: value for key, value in plain.items() if isinstance(value, (int, float, str, bool))}


def _plain(value: Tree) -> Tree:
    """A tensor of one number as that number; an empty one is a mark, so True."""
    if not isinstance(value, torch.Tensor) or value.numel() > 1 or value.device.type != "cpu":
        return value
    return value.item() if value.numel() else True


def _find_state_dict(tree: Tree) -> dict[str, torch.Tensor]:
    """The mapping of tensors: the whole file, or what is under `state_dict` or `model`, perhaps nested."""
    for _ in range(_MAX_NESTING):
        if not isinstance(tree, dict):
            raise CheckpointError(f"holds no state dict: found {_type_name(tree)} in its place")
        wrapper = next((name for name in _WRAPPERS if name in tree), None)
        if wrapper is None:
            break
        tree = tree[wrapper]
    if isinstance(tree, dict) and tree.keys() == _SECTIONS:
        parts = {name: part for name, part in tree.items() if isinstance(part, dict)}
        tree = {f"{name}.{key}": tensor for name, part in parts.items() for key, tensor in part.items()}
    if not isinstance(tree, dict) or not tree:
        raise CheckpointError(f"holds no tensors: found {_type_name(tree)} in place of a state dict")
    kinds = torch.Tensor, ScaledWeight
    tensors = {
        key: value
        for key, value in tree.items()
        if isinstance(key, str) and isinstance(value, torch.Tensor) and type(value) in kinds
    }
    if len(tensors) < len(tree):
        stray = next((key for key, value in tree.items() if type(value) not in kinds), None)
        found = ", ".join(repr(str(key)[:60]) for key in list(tree)[:5])
        raise CheckpointError(
            f"holds no state dict: {str(stray)[:60]!r} is not a tensor; it has {found}{looks_like(kind_of(tree))}"
        )
    return tensors


def _unwrapped(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict without the names that DataParallel and torch.compile put into the keys."""
    keys = {key: _WRAPPING_MODULES.sub("", key) for key in state_dict}
    if all(key == plain for key, plain in keys.items()):
        return state_dict
    plain = {keys[key]: tensor for key, tensor in state_dict.items()}
    if len(plain) != len(state_dict):
        twice = next(key for key, name in keys.items() if key != name and name in state_dict)
        raise CheckpointError(f"has two tensors for {keys[twice][:200]!r}, one of them under {twice[:200]!r}")
    return plain


def _type_name(value: object) -> str:
    return {"NoneType": "None", "dict": "empty mapping"}.get(type(value).__name__, type(value).__name__)


def _check_tensors(state_dict: Mapping[str, torch.Tensor]) -> None:
    """For every format: only plain tensors of known types in CPU memory leave this module."""
    known = {*DTYPES.values(), *FLOAT8}
    for key, tensor in state_dict.items():
        if tensor.layout is not torch.strided or tensor.device.type != "cpu" or tensor.dtype not in known:
            raise CheckpointError(f"tensor {key[:200]!r} is not a plain CPU tensor of a known type")
