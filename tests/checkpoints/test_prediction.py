"""The prediction type of a checkpoint is recognised, by every mark and in every layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ldm.checkpoints.convert import convert
from ldm.checkpoints.formats.detect import CheckpointError
from ldm.checkpoints.inspect import inspect_path
from ldm.checkpoints.layouts.prediction import foreign_prediction
from ldm.checkpoints.load import build_model, check_fit
from ldm.checkpoints.model_files import read_model
from ldm.config import read_config
from tests.support.golden_data import tiny_config

EMPTY = torch.empty(0)
KEYS = {
    "v_pred": "v-prediction",
    "ztsnr": "zero terminal SNR",
    "model.diffusion_model.v_pred": "v-prediction",
    "edm_vpred.sigma_max": "EDM's parameterization and v-prediction",
    "edm_mean": "EDM",
}
SAID = {
    "modelspec.prediction_type": "v",
    "modelspec.predict_key": "v",
    "prediction_type": "v_prediction",
    "parameterization": "v",
    "ss_v_parameterization": "True",
    "ss_zero_terminal_snr": "True",
    "ss_v2": "True",
}


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """Weights of the tiny model, and its schedule."""
    model = build_model(tiny_config())
    return {
        key: torch.randn(value.shape) if value.is_meta else value for key, value in model.state_dict().items()
    }


def save(path: Path, state: dict[str, Tensor], **said: Any) -> Path:
    """Writes a file in the layout given by its name's prefix."""
    if path.suffix == ".safetensors":
        save_file({key: value.contiguous() for key, value in state.items()}, path, said or None)
    else:
        torch.save({**said, "state_dict": state}, path, _use_new_zipfile_serialization=path.stem != "legacy")
    return path


def refuse(path: Path, reason: str) -> None:
    """Checks that the model is refused in one line, also by inspection, and that convert writes nothing."""
    with pytest.raises(CheckpointError, match=f"trained for .*{reason}") as caught:
        check_fit(build_model(tiny_config()), read_model(path))
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match=reason):
        convert(read_model(path), tiny_config(), path.parent / "out", "diffusers")
    assert not (path.parent / "out").exists()
    found = inspect_path(path, deep=False, config_for=lambda kind: tiny_config())[0]
    assert reason in found.prediction and found.fits is False and not found.sound


@pytest.mark.parametrize("name", ["m.ckpt", "legacy.ckpt", "m.safetensors"])
@pytest.mark.parametrize("key", KEYS)
def test_a_marking_key(tmp_path: Path, state: dict[str, Tensor], name: str, key: str) -> None:
    refuse(save(tmp_path / name, {**state, key: EMPTY}), KEYS[key])


@pytest.mark.parametrize("name", ["m.ckpt", "m.safetensors"])
@pytest.mark.parametrize("key", SAID)
def test_an_entry_beside_the_weights(tmp_path: Path, state: dict[str, Tensor], name: str, key: str) -> None:
    refuse(save(tmp_path / name, state, **{key: SAID[key]}), f"{key}: {SAID[key]}")


@pytest.mark.parametrize("said", [{"v_pred": EMPTY}, {"hyper_parameters": {"parameterization": "v"}}])
def test_a_mark_beside_the_state_dict(tmp_path: Path, state: dict[str, Tensor], said: dict[str, Any]) -> None:
    refuse(save(tmp_path / "m.ckpt", state, **said), "v-prediction")


@pytest.mark.parametrize(
    "text",
    [
        "model:\n  params:\n    parameterization: v\n",
        'model: {params: {parameterization: "v"}}',
        "target: sgm.modules.diffusionmodules.denoiser_scaling.VScaling",
        "scheduler:\n  prediction_type: v_prediction",
    ],
)
def test_a_config_beside_the_file(tmp_path: Path, state: dict[str, Tensor], text: str) -> None:
    (tmp_path / "m.yaml").write_text(text)
    refuse(save(tmp_path / "m.ckpt", state), "v-prediction")


def test_a_folder_of_diffusers(tmp_path: Path, state: dict[str, Tensor]) -> None:
    folder = tmp_path / "m"
    convert(read_model(save(tmp_path / "m.ckpt", state)), tiny_config(), folder, "diffusers")
    unet = folder / "unet" / "diffusion_pytorch_model.safetensors"
    whole = unet.read_bytes()
    weights = read_model(folder / "unet").state_dict
    save_file({"v_pred": EMPTY, **weights}, unet)
    refuse(folder, "v-prediction")
    unet.write_bytes(whole)
    scheduler = folder / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps({"prediction_type": "v_prediction"}))
    refuse(folder, "scheduler: prediction_type: v_prediction")
    assert "v-prediction" in read_model(folder / "unet").prediction, "a part says so too"
    shutil.rmtree(folder / "scheduler")
    check_fit(build_model(tiny_config()), read_model(folder))


def test_what_says_noise_or_nothing_is_run(tmp_path: Path, state: dict[str, Tensor]) -> None:
    (tmp_path / "m.yaml").write_text("# parameterization: v\nparameterization: eps\nv_pred: false\n")
    said = {"modelspec.prediction_type": "epsilon", "ss_v2": "False", "ss_zero_terminal_snr": "None"}
    check_fit(build_model(tiny_config()), read_model(save(tmp_path / "m.safetensors", state, **said)))
    assert foreign_prediction(["my_v_pred", "edmund.weight"], {"title": "v"}) == ""


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_rounded_schedule_is_the_same(tmp_path: Path, state: dict[str, Tensor], dtype: torch.dtype) -> None:
    rounded = {
        key: value.to(dtype) if key in ("betas", "alphas_cumprod") else value for key, value in state.items()
    }
    check_fit(build_model(tiny_config()), read_model(save(tmp_path / "m.ckpt", rounded)))


def test_another_schedule_is_refused(tmp_path: Path, state: dict[str, Tensor]) -> None:
    """Zero terminal SNR by Lin et al. 2024, algorithm 1; and LDM's schedule for other models."""
    root = state["alphas_cumprod"].double().sqrt()
    zero = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    other = torch.linspace(0.0015**0.5, 0.0195**0.5, 1000) ** 2
    for changes, reason in (
        ({"alphas_cumprod": zero.float()}, r"zero terminal SNR\), its alphas_cumprod shows"),
        ({"betas": other}, r"another noise schedule .* --config$"),
    ):
        path = save(tmp_path / "m.ckpt", {**state, **changes})
        with pytest.raises(CheckpointError, match=reason):
            check_fit(build_model(tiny_config()), read_model(path))


def test_the_published_configs_predict_the_noise() -> None:
    for name in ("v1-inference", "v1-inpainting-inference"):
        assert build_model(read_config(f"configs/stable-diffusion/{name}.yaml")).parameterization == "eps"
