"""Reads a checkpoint file of any supported kind into one flat mapping of names to tensors."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ldm.checkpoints.embedding_image import is_png, read_png_embedding
from ldm.checkpoints.formats.detect import CheckpointError, Kind, open_regular, reading, sniff
from ldm.checkpoints.formats.pickle_reader import DTYPES
from ldm.checkpoints.formats.safetensors_file import read_safetensors
from ldm.checkpoints.formats.tensor_bytes import FLOAT8
from ldm.checkpoints.formats.torch_legacy import read_torch_legacy
from ldm.checkpoints.formats.torch_zip import damaged_records, read_torch_zip
from ldm.checkpoints.layouts.names import CLASSES, PREFIXES, WORDS, Component, parts_in, to_compvis
from ldm.checkpoints.layouts.prediction import config_beside, foreign_prediction
from ldm.checkpoints.layouts.recognise import kind_of, looks_like
from ldm.job import MODEL_ENDINGS
from ldm.util import read_side_file

_WRAPPERS = ("state_dict", "model")
_WRAPPING_MODULES = re.compile(r"^((module|_orig_mod)\.)+|(?<=\.)_orig_mod\.")
_MAX_NESTING = 3
_MAX_NAMED = 5  # files in a message
_DESCRIPTIONS = ("hyper_parameters", "metadata", "__metadata__")  # mappings beside the state dict

Scalar = int | float | str | bool


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint as its file holds it: names to strided CPU tensors of the file's own types.

    `metadata` has the scalars that stand beside the state dict (`global_step`, `epoch`, ...) or the text
    metadata of a safetensors file. Of a diffusers folder `configs` has what its components say of themselves
    (`unet/config.json` and so on) and `vocabulary` the folder of its tokenizer. `prediction` says what else than
    the noise a model predicts, if `read_model` found that it does.
    """

    path: Path
    kind: Kind
    state_dict: Mapping[str, torch.Tensor]
    metadata: Mapping[str, Scalar] = field(default_factory=dict)
    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    vocabulary: Path | None = None
    prediction: str = ""


def read_checkpoint(path: str | os.PathLike[str], mmap: bool = True) -> Checkpoint:
    """Reads a `.ckpt` or `.safetensors` file, told apart by content, without running anything from it.

    With `mmap` the tensors are views on a private map of the file: nothing is read before it is used, and the
    file must stay as it is meanwhile. Without it the tensors are in memory (for network drives). Every fault
    of the file is a `CheckpointError` of one line.
    """
    with reading(path):
        tree, kind, metadata = _read_tree(path, mmap)
        state_dict = _unwrapped(_find_state_dict(tree))
        _check_tensors(state_dict)
        return Checkpoint(Path(path), kind, state_dict, metadata)


def read_tree(path: str | os.PathLike[str], mmap: bool = True) -> Any:
    """Everything a file holds, for files that are no models: dicts, lists, scalars, text and CPU tensors.

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
    within = [(name, tree[name]) for name in _DESCRIPTIONS if isinstance(tree.get(name), dict)]
    plain = {f"{name}: {key}": _plain(value) for name, inner in within for key, value in inner.items()}
    plain.update((key, _plain(value)) for key, value in tree.items())
    return {str(key): value for key, value in plain.items() if isinstance(value, (int, float, str, bool))}


def _plain(value: Any) -> Any:
    """A tensor of one number as that number; an empty one is a mark, so True."""
    if not isinstance(value, torch.Tensor) or value.numel() > 1 or value.device.type != "cpu":
        return value
    return value.item() if value.numel() else True


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
            raise CheckpointError(f"tensor {key[:200]!r} is no plain CPU tensor of a known type")


# --- models of any layout -----------------------------------------------------------------------------------------

MODEL_INDEX = "model_index.json"
# the best first: without a pickle, then in full precision
_WEIGHTS = (
    ("diffusion_pytorch_model", "safetensors"),
    ("model", "safetensors"),
    ("diffusion_pytorch_model", "bin"),
    ("pytorch_model", "bin"),
)
_VARIANTS = ("", ".fp16")
_HARMLESS_COMPONENTS = {"tokenizer", "scheduler", "safety_checker", "feature_extractor"}
_VOCABULARIES = ("vocab.json", "tokenizer.json")


def read_model(
    path: str | os.PathLike[str],
    mmap: bool = True,
    vae: str | os.PathLike[str] | None = None,
    text_encoder: str | os.PathLike[str] | None = None,
) -> Checkpoint:
    """A model, or what a file has of one, under CompVis's names: from any file or a folder of diffusers.

    `vae` and `text_encoder` are files or folders whose part of that kind takes the place of the model's own,
    if it has one. The layout is told by the content. Nothing is run from a file. Faults are a
    `CheckpointError` of one line.
    """
    others: dict[Component, str | os.PathLike[str]] = {}
    if vae is not None:
        others["vae"] = vae
    if text_encoder is not None:
        others["text_encoder"] = text_encoder
    model = _read_any(path, mmap, [part for part in PREFIXES if part not in others])
    for part, other in others.items():
        model = _with_part(model, part, _read_any(other, mmap, [part]))
    return model


def model_files(path: str | os.PathLike[str], only: Component | None = None) -> list[Path]:
    """The files that `read_model` takes the weights from; of a folder, those of one component if `only` says so."""
    parts: list[Component] = list(PREFIXES) if only is None else [only]
    with reading(path):
        if not os.path.isdir(path):
            return [Path(path)]
        return [file for folder in _components(Path(path), parts).values() for file in _weights(folder)]


def _read_any(path: str | os.PathLike[str], mmap: bool, parts: list[Component]) -> Checkpoint:
    """The parts of a folder, or all that a file holds, under CompVis's names."""
    model = _read_folder(Path(path), mmap, parts) if os.path.isdir(path) else read_checkpoint(path, mmap)
    with reading(path):
        scheduler = model.configs.get("scheduler", {}).items()
        said = {**model.metadata, **{f"scheduler: {k}": v for k, v in scheduler}, **config_beside(path)}
        prediction = foreign_prediction(model.state_dict, said)
        return replace(model, state_dict=to_compvis(model.state_dict), prediction=prediction)


def _with_part(model: Checkpoint, part: Component, other: Checkpoint) -> Checkpoint:
    """`model` with its `part` from `other`, which its path then names."""
    prefix = PREFIXES[part]
    new = {key: tensor for key, tensor in other.state_dict.items() if key.startswith(prefix)}
    with reading(other.path):
        if part not in parts_in(new):
            raise CheckpointError(f"has no {WORDS[part]}: it is {kind_of(other.state_dict).name}")
    kept = {key: tensor for key, tensor in model.state_dict.items() if not key.startswith(prefix)}
    configs = {name: config for name, config in model.configs.items() if name != part}
    if part in other.configs:
        configs[part] = other.configs[part]
    vocabulary = other.vocabulary if part == "text_encoder" and other.vocabulary else model.vocabulary
    path = Path(f"{model.path} with {other.path}")
    return replace(model, path=path, state_dict={**kept, **new}, configs=configs, vocabulary=vocabulary)


def _read_folder(folder: Path, mmap: bool, parts: list[Component]) -> Checkpoint:
    """A folder that diffusers saved, or one of the folders in it."""
    with reading(folder):
        components = _components(folder, parts)
        files = [(part, file) for part, component in components.items() for file in _weights(component)]
        configs = {part or "": read_json(component / "config.json") for part, component in components.items()}
        whole = folder if None not in components else folder.parent
        configs["scheduler"] = read_json(whole / "scheduler" / "scheduler_config.json")
    state_dict: dict[str, torch.Tensor] = {}
    metadata: dict[str, Scalar] = {}
    kind: Kind = "safetensors"
    for part, file in files:
        read = read_checkpoint(file, mmap)
        kind = read.kind
        named = {f"{part}.{key}" if part else key: tensor for key, tensor in read.state_dict.items()}
        with reading(file):
            if twice := state_dict.keys() & named.keys():
                raise CheckpointError(f"repeats {min(twice)[:200]!r} of another file of its folder")
        state_dict.update(named)
        metadata.update(read.metadata)
    if configs.get(""):  # a component alone: what it is, its weights tell
        word = kind_of(state_dict).part
        configs.update({part: configs[""] for part in PREFIXES if WORDS[part] == word})
    found = {name: config for name, config in configs.items() if name and config}
    return Checkpoint(folder, kind, state_dict, metadata, found, _vocabulary(folder))


def _components(folder: Path, parts: list[Component]) -> dict[Component | None, Path]:
    """The folders that the parts lie in: those that the index names, or the folder itself, of one unknown part."""
    if not os.path.lexists(folder / MODEL_INDEX):
        return {None: folder}
    index = read_json(folder / MODEL_INDEX)
    classes = {
        name: str(value[1])
        for name, value in index.items()
        if isinstance(value, list) and len(value) == 2 and value[1] is not None
    }
    foreign = sorted(set(classes) - set(PREFIXES) - _HARMLESS_COMPONENTS)
    foreign += [classes[part] for part in parts if classes.get(part, CLASSES[part]) != CLASSES[part]]
    absent = [part for part in parts if part not in classes]
    if foreign or absent:
        reason = f"with {', '.join(foreign)}" if foreign else f"without {', '.join(absent)}"
        pipeline = str(index.get("_class_name"))[:80]
        raise CheckpointError(
            f"is a diffusers folder of {pipeline} {reason[:200]}; this toolkit runs Stable Diffusion v1"
        )
    return {part: folder / part for part in parts}


def _weights(folder: Path) -> list[Path]:
    """The files of a component's weights, the best of those that are there."""
    for stem, extension in _WEIGHTS:
        for variant in _VARIANTS:
            if (whole := folder / f"{stem}{variant}.{extension}").is_file():
                return [whole]
            if (index := folder / f"{stem}.{extension}.index{variant}.json").is_file():
                return list(_shards(index))
    inside = sorted(path.name for path in folder.glob("*") if path.name.endswith(MODEL_ENDINGS))
    if inside:
        more = ", ..." if len(inside) > _MAX_NAMED else ""
        raise CheckpointError(
            f"is a folder, but not in the layout of diffusers; give a file in it: "
            f"{', '.join(inside[:_MAX_NAMED])}{more}"
        )
    names = " nor ".join(f"{stem}.{extension}" for stem, extension in _WEIGHTS)
    raise CheckpointError(f"holds no weights: neither {names} is in {folder.name or 'it'}")


def _shards(index: Path) -> Iterator[Path]:
    """The files that an index names, each once; all beside it."""
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise CheckpointError(f"has no weight_map in {index.name}")
    for name in sorted(set(map(str, files.values()))):
        if Path(name).name != name or name == "..":
            raise CheckpointError(
                f"names a file outside of its folder in {index.name}: {name[:200]!r}; refused"
            )
        yield index.with_name(name)


def vocabulary_folder(
    path: str | os.PathLike[str], text_encoder: str | os.PathLike[str] | None = None
) -> Path | None:
    """The folder of the tokenizer that `read_model` finds; None where neither folder brings one."""
    folders = (Path(place) for place in (text_encoder, path) if place is not None and os.path.isdir(place))
    return next(filter(None, map(_vocabulary, folders)), None)


def _vocabulary(folder: Path) -> Path | None:
    places = (folder / "tokenizer", folder)
    return next((place for place in places if any((place / name).is_file() for name in _VOCABULARIES)), None)


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file of a folder; empty without the file. Faults are a `CheckpointError`."""
    if not os.path.lexists(path):
        return {}
    with reading(path):
        tree = json.loads(read_side_file(path))
        if not isinstance(tree, dict):
            raise CheckpointError("is not a JSON mapping")
        return tree
