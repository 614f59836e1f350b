"""Models that differ from the published configs are built as their files need it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.checkpoints.convert import convert
from ldm.checkpoints.formats.detect import CheckpointError
from ldm.checkpoints.inspect import inspect_path
from ldm.checkpoints.load import build_model, check_fit
from ldm.checkpoints.model_files import read_model
from ldm.checkpoints.variants import suited
from ldm.pipeline import load_model
from tests.support.golden_data import rebuilt_state_dict, tiny_config

State = Mapping[str, Tensor]
LAST_LAYER = "cond_stage_model.transformer.text_model.encoder.layers.1."


@pytest.fixture(scope="module")
def weights() -> State:
    return rebuilt_state_dict(build_model(tiny_config()))


def saved(path: Path, state: State) -> Path:
    torch.save(dict(state), path)
    return path


# --- text encoders without their last layers ----------------------------------------------------------------------


@pytest.mark.parametrize("to", ["compvis", "diffusers"])
def test_a_text_encoder_with_built_in_clip_skip(tmp_path: Path, weights: State, tiny: Any, to: Any) -> None:
    """Without its last layer it gives the states of CLIP skip 2, and keeps its layers in conversions."""
    path = saved(tmp_path / "m.ckpt", {k: v for k, v in weights.items() if not k.startswith(LAST_LAYER)})
    out = tmp_path / ("out.safetensors" if to == "compvis" else "out")
    convert(read_model(path), tiny_config(), out, to)
    for file in (path, out):
        model = load_model(tiny_config(), file)
        expected = tiny.get_learned_conditioning(["a cat"], clip_skip=2)
        assert torch.equal(model.get_learned_conditioning(["a cat"]), expected)
        assert not torch.equal(expected, tiny.get_learned_conditioning(["a cat"]))
        found = inspect_path(file, deep=False, config_for=lambda kind: tiny_config())[0]
        assert found.sound and found.fits, found.problem


def test_a_folder_that_states_fewer_layers_than_it_has(tmp_path: Path, weights: State, tiny: Any) -> None:
    convert(read_model(saved(tmp_path / "m.ckpt", weights)), tiny_config(), tmp_path / "m", "diffusers")
    config = tmp_path / "m/text_encoder/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_hidden_layers": 1}))
    model = load_model(tiny_config(), tmp_path / "m")
    assert torch.equal(
        model.get_learned_conditioning(["a cat"]), tiny.get_learned_conditioning(["a cat"], clip_skip=2)
    )


def test_a_layer_that_is_missing_between_others_is_an_error(tmp_path: Path, weights: State) -> None:
    first = LAST_LAYER.replace("layers.1.", "layers.0.")
    path = saved(tmp_path / "m.ckpt", {k: v for k, v in weights.items() if not k.startswith(first)})
    config = tiny_config()
    assert suited(config, read_model(path)) is config
    with pytest.raises(CheckpointError, match=r"lacks 16 keys .*layers\.0"):
        load_model(config, path)
    check_fit(build_model(config), read_model(path))
