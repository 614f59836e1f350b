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
from ldm.checkpoints.formats.read import read_checkpoint
from ldm.checkpoints.inspect import inspect_path
from ldm.checkpoints.layouts.prediction import Prediction, stated_prediction
from ldm.checkpoints.load import build_model, check_fit
from ldm.checkpoints.model_files import read_model
from ldm.checkpoints.variants import suited
from ldm.config import read_config
from ldm.models.diffusion.schedule import make_beta_schedule, zero_terminal_snr
from ldm.pipeline import load_model
from tests.support.golden_data import WEIGHT_PREFIXES, small_config

EMPTY = torch.empty(0)
V, ZERO = {"parameterization": "v"}, {"parameterization": "v", "zero_terminal_snr": True}
KEYS = {"v_pred": V, "ztsnr": ZERO, "model.diffusion_model.v_pred": V}
FOREIGN_KEYS = {"edm_vpred.sigma_max": "EDM's parameterization and v-prediction", "edm_mean": "EDM"}
SAID = {
    "modelspec.prediction_type": ("v", V),
    "modelspec.predict_key": ("v", V),
    "prediction_type": ("v_prediction", V),
    "parameterization": ("v", V),
    "ss_v_parameterization": ("True", V),
    "ss_zero_terminal_snr": ("True", ZERO),
}
FOREIGN = {
    "ss_v2": "True",
    "prediction_type": "sample",
    "modelspec.prediction_type": "x0",
}


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """Weights of a small model, and its schedule."""
    model = build_model(small_config())
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
        check_fit(build_model(small_config()), read_model(path))
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match=reason):
        convert(read_model(path), small_config(), path.parent / "out", "diffusers")
    assert not (path.parent / "out").exists()
    found = inspect_path(path, deep=False, config_for=lambda kind: small_config())[0]
    assert reason in found.prediction and found.fits is False and not found.sound


def run(path: Path, wanted: dict[str, Any]) -> None:
    """Checks that the model is built as `wanted` says, fits, and is sound for inspection."""
    checkpoint = read_model(path)
    config = suited(small_config(), checkpoint)
    assert {**config["params"], **wanted} == config["params"]
    assert {name: config["params"].get(name) for name in ZERO} == {**dict.fromkeys(ZERO), **wanted}
    check_fit(build_model(config), checkpoint)
    found = inspect_path(path, deep=False, config_for=lambda kind: small_config())[0]
    assert "v-prediction" in found.prediction or "zero terminal SNR" in found.prediction
    assert found.sound and found.fits, found.problem


@pytest.mark.parametrize(
    "name",
    [*(pytest.param(name, marks=pytest.mark.long) for name in ("m.ckpt", "legacy.ckpt")), "m.safetensors"],
)
def test_a_marking_key(tmp_path: Path, state: dict[str, Tensor], name: str) -> None:
    for key, wanted in KEYS.items():
        run(save(tmp_path / name, {**without_schedule(state), key: EMPTY}), wanted)
    for key, reason in FOREIGN_KEYS.items():
        refuse(save(tmp_path / name, {**state, key: EMPTY}), reason)


def without_schedule(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if key.startswith(WEIGHT_PREFIXES)}


@pytest.mark.parametrize("name", [pytest.param("m.ckpt", marks=pytest.mark.long), "m.safetensors"])
def test_an_entry_beside_the_weights(tmp_path: Path, state: dict[str, Tensor], name: str) -> None:
    for key, (value, wanted) in SAID.items():
        run(save(tmp_path / name, without_schedule(state), **{key: value}), wanted)
    for key, value in FOREIGN.items():
        refuse(save(tmp_path / name, state, **{key: value}), f"{key}: {value}")


@pytest.mark.parametrize("said", [{"v_pred": EMPTY}, {"hyper_parameters": {"parameterization": "v"}}])
def test_a_mark_beside_the_state_dict(tmp_path: Path, state: dict[str, Tensor], said: dict[str, Any]) -> None:
    run(save(tmp_path / "m.ckpt", state, **said), V)


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
    run(save(tmp_path / "m.ckpt", state), V)


def test_a_folder_of_diffusers(tmp_path: Path, state: dict[str, Tensor]) -> None:
    folder = tmp_path / "m"
    convert(read_model(save(tmp_path / "m.ckpt", state)), small_config(), folder, "diffusers")
    unet = folder / "unet" / "diffusion_pytorch_model.safetensors"
    whole = unet.read_bytes()
    save_file({"v_pred": EMPTY, **read_checkpoint(unet, mmap=False).state_dict}, unet)
    (folder / "scheduler/scheduler_config.json").unlink()
    run(folder, V)
    unet.write_bytes(whole)
    scheduler = folder / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}))
    run(folder, ZERO)
    assert "v-prediction" in read_model(folder / "unet").prediction.stated, "a part says so too"
    assert not read_model(folder, prediction="eps").prediction.stated
    check_fit(build_model(small_config()), read_model(folder, prediction="eps"))
    scheduler.write_text(json.dumps({"prediction_type": "sample"}))
    refuse(folder, "scheduler: prediction_type: sample")
    shutil.rmtree(folder / "scheduler")
    check_fit(build_model(small_config()), read_model(folder))


def test_a_choice_counts_more_than_the_file(tmp_path: Path, state: dict[str, Tensor]) -> None:
    path = save(tmp_path / "m.safetensors", without_schedule(state), ss_zero_terminal_snr="True")
    for choice, wanted in (("auto", ZERO), ("v", ZERO), ("eps", {})):
        params = suited(small_config(), read_model(path, prediction=choice))["params"]
        assert {name: params.get(name) for name in ZERO} == {**dict.fromkeys(ZERO), **wanted}
    adapted = suited(small_config(), read_model(path))
    again = suited(adapted, read_model(path, prediction="eps"))["params"]
    assert (again["parameterization"], again["zero_terminal_snr"]) == ("eps", False)
    plain = save(tmp_path / "plain.ckpt", state)
    assert suited(small_config(), read_model(plain, prediction="v"))["params"]["parameterization"] == "v"
    model = load_model(small_config(), plain, prediction="v")
    assert (model.parameterization, float(model.alphas_cumprod[-1])) == (
        "v",
        pytest.approx(0.00466, abs=1e-5),
    )


def test_zero_snr_of_a_model_of_the_noise_is_refused(tmp_path: Path, state: dict[str, Tensor]) -> None:
    said = {"modelspec.prediction_type": "epsilon", "ss_zero_terminal_snr": "True"}
    refuse(save(tmp_path / "m.safetensors", without_schedule(state), **said), "though it predicts the noise")


@pytest.mark.parametrize(
    "to", [*(pytest.param(to, marks=pytest.mark.long) for to in ("compvis", "ckpt")), "diffusers"]
)
def test_a_conversion_keeps_the_prediction(tmp_path: Path, state: dict[str, Tensor], to: Any) -> None:
    out = tmp_path / {"compvis": "out.safetensors", "ckpt": "out.ckpt", "diffusers": "out"}[to]
    weights = [key for key in without_schedule(state) if not key.endswith("position_ids")]
    for mark, wanted in (("v_pred", V), ("ztsnr", ZERO)):
        source = save(tmp_path / "m.ckpt", {**without_schedule(state), mark: EMPTY})
        convert(read_model(source), small_config(), out, to)
        run(out, wanted)
        written = read_model(out).state_dict
        assert all(torch.equal(written[key], state[key]) for key in weights)
        shutil.rmtree(out) if out.is_dir() else out.unlink()


def test_what_says_noise_or_nothing_is_run(tmp_path: Path, state: dict[str, Tensor]) -> None:
    (tmp_path / "m.yaml").write_text("# parameterization: v\nparameterization: eps\nv_pred: false\n")
    said = {"modelspec.prediction_type": "epsilon", "ss_v2": "False", "ss_zero_terminal_snr": "None"}
    checkpoint = read_model(save(tmp_path / "m.safetensors", state, **said))
    config = small_config()
    assert suited(config, checkpoint) is config
    check_fit(build_model(config), checkpoint)
    assert stated_prediction({"my_v_pred": 0, "edmund.weight": 0}, {"title": "v"}) == Prediction()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_rounded_schedule_is_the_same(tmp_path: Path, state: dict[str, Tensor], dtype: torch.dtype) -> None:
    rounded = {
        key: value.to(dtype) if key in ("betas", "alphas_cumprod") else value for key, value in state.items()
    }
    check_fit(build_model(small_config()), read_model(save(tmp_path / "m.ckpt", rounded)))


@pytest.mark.long
def test_the_schedule_of_a_file(tmp_path: Path, state: dict[str, Tensor]) -> None:
    """One that ends without signal is used; LDM's for other models is refused."""
    betas = torch.tensor(zero_terminal_snr(make_beta_schedule("linear", 1000, 0.00085, 0.012)))
    levels = torch.cumprod(1 - betas, 0)
    for name, values in (
        ("alphas_cumprod", levels.float()),
        ("alphas_cumprod", levels.half()),
        ("betas", betas),
    ):
        run(save(tmp_path / "m.ckpt", {**without_schedule(state), name: values}), ZERO)
    other = torch.linspace(0.0015**0.5, 0.0195**0.5, 1000) ** 2
    with pytest.raises(CheckpointError, match=r"another noise schedule .* --config$"):
        check_fit(
            build_model(small_config()), read_model(save(tmp_path / "m.ckpt", {**state, "betas": other}))
        )


def test_the_published_configs_predict_the_noise() -> None:
    for name in ("v1-inference", "v1-inpainting-inference"):
        assert build_model(read_config(f"configs/stable-diffusion/{name}.yaml")).parameterization == "eps"
