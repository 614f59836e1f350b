"""The files that make up a model, and the model that they make: one file of any layout, or a diffusers folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from ldm.checkpoints.formats.detect import CheckpointError, Format, reading
from ldm.checkpoints.formats.read import Checkpoint, Scalar, read_checkpoint
from ldm.checkpoints.layouts.names import (
    CLASSES,
    PREFIXES,
    SMALL_CLASSES,
    WORDS,
    Component,
    keys_of_half,
    parts_in,
    small_halves,
    to_compvis,
)
from ldm.checkpoints.layouts.prediction import Choice, Prediction, config_beside, stated_prediction
from ldm.checkpoints.layouts.recognise import kind_of
from ldm.files import read_side_file
from ldm.job import MODEL_ENDINGS
from ldm.json_value import JsonObject, load_json

_MAX_NAMED = 5  # files in a message
MODEL_INDEX = "model_index.json"
# the best first: without a pickle, then in full precision
_WEIGHTS = (
    ("diffusion_pytorch_model", "safetensors"),
    ("model", "safetensors"),
    ("diffusion_pytorch_model", "bin"),
    ("pytorch_model", "bin"),
)
_VARIANTS = ("", ".fp16")
_TAESD_HALVES = ("taesd_encoder", "taesd_decoder")
_HARMLESS_COMPONENTS = {"tokenizer", "scheduler", "safety_checker", "feature_extractor"}
_VOCABULARIES = ("vocab.json", "tokenizer.json")


def read_model(
    path: str | os.PathLike[str],
    mmap: bool = True,
    vae: str | os.PathLike[str] | None = None,
    text_encoder: str | os.PathLike[str] | None = None,
    prediction: Choice = "auto",
) -> Checkpoint:
    """A model, or what a file has of one, under CompVis's names: from any file or a folder of diffusers.

    `vae` and `text_encoder` are files or folders whose part of that kind takes the place of the model's own,
    if it has one. With a `prediction` other than "auto" what the files state about it does not count. The layout is
    recognised by content. Nothing in a file is run. Faults are a `CheckpointError` of one line.
    """
    others: dict[Component, str | os.PathLike[str]] = {}
    if vae is not None:
        others["vae"] = vae
    if text_encoder is not None:
        others["text_encoder"] = text_encoder
    model = _read_any(path, mmap, [part for part in PREFIXES if part not in others])
    for part, other in others.items():
        model = _with_part(model, part, _read_any(other, mmap, [part]))
    return model if prediction == "auto" else _with_prediction(model, prediction)


def model_files(path: str | os.PathLike[str], only: Component | None = None) -> list[Path]:
    """The files that `read_model` takes the weights from; of a folder, those of one component with `only`."""
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
        entries = {**model.metadata, **{f"scheduler: {k}": v for k, v in scheduler}, **config_beside(path)}
        prediction = stated_prediction(model.state_dict, entries)
        return replace(model, state_dict=to_compvis(model.state_dict), prediction=prediction)


def _with_part(model: Checkpoint, part: Component, other: Checkpoint) -> Checkpoint:
    """`model` with its `part` from `other`, which its path then names; of TAESD, with the halves that it has."""
    prefix = PREFIXES[part]
    new = {key: tensor for key, tensor in other.state_dict.items() if key.startswith(prefix)}
    with reading(other.path):
        if part not in parts_in(new):
            raise CheckpointError(f"has no {WORDS[part]}: it is {other.kind.name}")
    halves = small_halves(new)
    replaced = tuple(name for half in halves for name in keys_of_half(half)) or prefix
    kept = {key: tensor for key, tensor in model.state_dict.items() if not key.startswith(replaced)}
    configs = {name: config for name, config in model.configs.items() if name != part}
    if part in other.configs:
        configs[part] = other.configs[part]
    vocabulary = other.vocabulary if part == "text_encoder" and other.vocabulary else model.vocabulary
    path = Path(f"{model.path} with {other.path}")
    return replace(model, path=path, state_dict={**kept, **new}, configs=configs, vocabulary=vocabulary)


def _with_prediction(model: Checkpoint, choice: Literal["eps", "v"]) -> Checkpoint:
    """`model` as if it stated this prediction type, and its scheduler's settings none."""
    stated = ("prediction_type", "rescale_betas_zero_snr")
    scheduler = {k: v for k, v in model.configs.get("scheduler", {}).items() if k not in stated}
    configs = {**model.configs, "scheduler": scheduler} if model.configs else {}
    return replace(model, configs=configs, prediction=Prediction.chosen(choice, model.prediction))


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
    found: Format = "safetensors"
    for part, file in files:
        read = read_checkpoint(file, mmap)
        found = read.format
        prefix = part or (file.stem if file.stem in _TAESD_HALVES else "")
        named = {f"{prefix}.{key}" if prefix else key: tensor for key, tensor in read.state_dict.items()}
        with reading(file):
            if twice := state_dict.keys() & named.keys():
                raise CheckpointError(f"repeats {min(twice)[:200]!r} of another file of its folder")
        state_dict.update(named)
        metadata.update(read.metadata)
    if configs.get(""):  # of a component alone, whose kind is known from its weights
        word = kind_of(state_dict).part
        configs.update({part: configs[""] for part in PREFIXES if WORDS[part] == word})
    settings = {name: config for name, config in configs.items() if name and config}
    return Checkpoint(folder, found, state_dict, metadata, settings, _vocabulary(folder))


def _components(folder: Path, parts: list[Component]) -> dict[Component | None, Path]:
    """The folders of the parts: those that the index names, or the folder itself, of one unknown part."""
    if not os.path.lexists(folder / MODEL_INDEX):
        return {None: folder}
    index = read_json(folder / MODEL_INDEX)
    classes = {
        name: str(value[1])
        for name, value in index.items()
        if isinstance(value, list) and len(value) == 2 and value[1] is not None
    }
    foreign = sorted(set(classes) - set(PREFIXES) - _HARMLESS_COMPONENTS)
    foreign += [
        classes[part]
        for part in parts
        if classes.get(part, CLASSES[part]) not in (CLASSES[part], SMALL_CLASSES.get(part))
    ]
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
    if halves := [file for half in _TAESD_HALVES for file in _first_there(folder, half)]:
        return halves
    inside = sorted(path.name for path in folder.glob("*") if path.name.endswith(MODEL_ENDINGS))
    if inside:
        more = ", ..." if len(inside) > _MAX_NAMED else ""
        raise CheckpointError(
            f"is a folder, but not in the layout of diffusers; give a file in it: "
            f"{', '.join(inside[:_MAX_NAMED])}{more}"
        )
    names = " nor ".join(f"{stem}.{extension}" for stem, extension in _WEIGHTS)
    raise CheckpointError(f"holds no weights: neither {names} is in {folder.name or 'it'}")


def _first_there(folder: Path, stem: str) -> list[Path]:
    """The file of half a TAESD, if the folder has it."""
    return [file for end in (".safetensors", ".pth") if (file := folder / f"{stem}{end}").is_file()][:1]


def _shards(index: Path) -> Iterator[Path]:
    """The files that an index names, each once; all are in its folder."""
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


def read_json(path: Path) -> JsonObject:
    """The mapping in a JSON file of a folder; empty without the file. Faults are a `CheckpointError`."""
    if not os.path.lexists(path):
        return {}
    with reading(path):
        tree = load_json(read_side_file(path))
        if not isinstance(tree, dict):
            raise CheckpointError("is not a JSON mapping")
        return tree
