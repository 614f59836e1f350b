"""The config of a model as its checkpoint needs it: published configs describe one kind of v1 model only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ldm.checkpoints.formats.read import Checkpoint


def suited(config: Mapping[str, Any], checkpoint: Checkpoint) -> Mapping[str, Any]:
    """Returns a checked config with what `checkpoint` states about itself; the same object if nothing differs."""
    params = config.get("params")
    if not isinstance(params, Mapping):
        return config
    changes = _of_prediction(params, checkpoint)
    return {**config, "params": {**params, **changes}} if changes else config


def _of_prediction(params: Mapping[str, Any], checkpoint: Checkpoint) -> dict[str, Any]:
    """What the U-Net predicts, and whether the schedule ends without signal."""
    stated = checkpoint.prediction
    wanted: dict[str, Any] = {}
    if stated.parameterization:
        wanted["parameterization"] = stated.parameterization
    if stated.zero_snr:
        wanted["zero_terminal_snr"] = True
    usual = {"parameterization": "eps", "zero_terminal_snr": False}
    return {name: value for name, value in wanted.items() if params.get(name, usual[name]) != value}
