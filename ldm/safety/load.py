"""Finds and loads the safety checker's model: from local files, never from the network."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ldm.checkpoints.formats.detect import CheckpointError, open_regular, reading, sniff
from ldm.checkpoints.formats.read import read_checkpoint
from ldm.checkpoints.load import load_into, skip_init
from ldm.checkpoints.model_files import read_json
from ldm.json_value import Json, JsonObject
from ldm.places import find, hub_files
from ldm.safety.network import SafetyChecker
from ldm.util import printable

OWN_FOLDER = "models/safety_checker"
REPOSITORY = "CompVis/stable-diffusion-safety-checker"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_MAX_SIZE = 10_000

# SafetyChecker's parameter -> its name in a config.json, and the value that transformers leaves out
_VISION_SIZES = {
    "side": ("image_size", 224),
    "patch": ("patch_size", 32),
    "width": ("hidden_size", 768),
    "layers": ("num_hidden_layers", 12),
    "heads": ("num_attention_heads", 12),
    "inner": ("intermediate_size", 3072),
}
_PROJECTION = ("projection_dim", 512)
_ACTIVATION = ("hidden_act", "quick_gelu")


def find_safety_model(path: str | os.PathLike[str] | None = None) -> Path | None:
    """Finds the weights file of a safety model on this computer; None if there is none.

    `path` is such a file or its folder. By default it searches `models/safety_checker` (here or
    in the toolkit's folder) and the Hugging Face cache. A given path or `models/safety_checker` without a weights
    file is a `CheckpointError`, so that a check that the user has set up is not left out silently.
    """
    if path is None and not os.path.lexists(find(OWN_FOLDER)):
        return next(hub_files([REPOSITORY], WEIGHTS), None)
    return _weights_file(find(OWN_FOLDER if path is None else os.fspath(path)))


def load_safety_model(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> SafetyChecker:
    """Loads the safety model of a weights file, or of its folder, in float32 and evaluation mode.

    Its sizes are those of the `config.json` next to the weights, else those of v1. Missing, unknown and
    misshapen weights, and a config of another kind of model, are a `CheckpointError` of one line.
    """
    weights = _weights_file(Path(path))
    checkpoint = read_checkpoint(weights)
    with torch.device("meta"), skip_init():
        model = SafetyChecker(**_sizes(weights.with_name("config.json")))
    unknown = [key for key in checkpoint.state_dict if key not in model.state_dict()]
    if unknown:
        raise CheckpointError(
            f"{printable(weights)}: {printable(unknown[0][:200])} is not a weight of the safety checker: "
            f"config.json or weights are of another model; use those of {REPOSITORY}"
        )
    load_into(model, checkpoint, dtype=torch.float32, ema="off")
    return model.eval().to(device)


def _weights_file(path: Path) -> Path:
    """Returns `path`, or the weights in it if it is a folder; refuses files that do not begin like weights."""
    with reading(path):
        if path.is_dir():
            path = _weights_in(path)
        with open_regular(path) as file:
            sniff(file)
    return path


def _weights_in(folder: Path) -> Path:
    found = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if found is None:
        raise CheckpointError(
            f"holds no safety model: neither {' nor '.join(WEIGHTS)} is in it; "
            f"put the files of {REPOSITORY} there"
        )
    return found


def _sizes(config: Path) -> dict[str, int]:
    """Returns the parameters of `SafetyChecker` in a config.json; an empty dict, for v1's, if there is no file."""
    if not os.path.lexists(config):
        return {}
    with reading(config):
        tree = read_json(config)
        vision = _mapping(tree.get("vision_config"), "vision_config")
        activation = vision.get(*_ACTIVATION)
        if activation != _ACTIVATION[1]:
            raise CheckpointError(f"hidden_act is {activation!r}; the safety checker has {_ACTIVATION[1]!r}")
        sizes = {name: _size(vision, *entry) for name, entry in _VISION_SIZES.items()}
        sizes["projection"] = _size(tree, *_PROJECTION)
        if sizes["width"] % sizes["heads"] or sizes["patch"] > sizes["side"]:
            raise CheckpointError(f"describes no network: {sizes}")
        return sizes


def _mapping(value: Json, name: str) -> JsonObject:
    if not isinstance(value, dict):
        raise CheckpointError(f"is not a config of a safety checker: {name} is not a mapping")
    return value


def _size(config: Mapping[str, Any], name: str, default: int) -> int:
    value = config.get(name, default)
    if type(value) is not int or not 1 <= value <= _MAX_SIZE:
        raise CheckpointError(f"{name} is {value!r}; it must be a whole number from 1 to {_MAX_SIZE}")
    return value
