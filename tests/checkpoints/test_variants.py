"""Models that differ from the published configs are built as their files need it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.checkpoints.convert import convert
from ldm.checkpoints.formats.detect import CheckpointError
from ldm.checkpoints.inspect import inspect_path
from ldm.checkpoints.inspection_text import lines
from ldm.checkpoints.layouts.names import to_compvis, to_diffusers
from ldm.checkpoints.layouts.settings import component_configs
from ldm.checkpoints.load import build_model, check_fit
from ldm.checkpoints.model_files import read_model
from ldm.checkpoints.variants import suited
from ldm.job import Job
from ldm.pipeline import Pipeline, load_model
from ldm.runs.options import RunOptions
from ldm.runs.prepare import prepare as prepare_run
from ldm.runtime.estimate import NetworkWork
from ldm.runtime.prepare import prepare
from ldm.util import InputError
from tests.support.golden_data import rebuilt_state_dict, relative_error, tiny_config, tiny_model

State = Mapping[str, Tensor]
LAST_LAYER = "cond_stage_model.transformer.text_model.encoder.layers.1."


@pytest.fixture(scope="module")
def weights() -> State:
    return rebuilt_state_dict(build_model(tiny_config()))


def saved(path: Path, state: State) -> Path:
    torch.save(dict(state), path)
    return path


# --- text encoders without their last layers ----------------------------------------------------------------------


@pytest.mark.slow
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
        assert ["CLIP skip 2 is built in" in variant for variant in found.variants] == [True]


@pytest.mark.long
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


# --- small U-Nets -------------------------------------------------------------------------------------------------

BASE = {"channel_mult": [1, 2, 4, 4], "num_res_blocks": 1, "attention_resolutions": [1, 2, 4]}
SMALL = {**BASE, "use_middle_block": False}
TINY = {**SMALL, "channel_mult": [1, 2, 4]}


def small_config(**changes: Any) -> dict[str, Any]:
    config = tiny_config()
    config["params"]["unet_config"]["params"].update(changes)
    return config


def with_gaps(key: str) -> str:
    """The name that diffusers' script for single files gives to a weight: room for three blocks in each level.

    It gives none to an attention where v1 has none, and counts on one before the upsampling of all other levels.
    """
    match = re.match(r"(.*\.)(input|output)_blocks\.(\d+)\.(\d)\.(.*)", key)
    if match is None or (match[3] == "0" == match[4] and match[2] == "input"):
        return key
    head, way, place, part, rest = match[1], match[2], int(match[3]), match[4], match[5]
    if way == "input":
        level, down = divmod(place - 1, 2)
        return f"{head}input_blocks.{3 * level + (3 if down else 1)}.{part}.{rest}"
    level, i = divmod(place, 2)
    if rest.startswith("conv."):
        return f"{head}output_blocks.{3 * level + 2}.{1 if level == 0 else 2}.{rest}"
    if part == "1" and level == 0:
        return f"{head}up_blocks.0.attentions.{i}.{rest}"
    return f"{head}output_blocks.{3 * level + i}.{part}.{rest}"


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(BASE, id="base", marks=pytest.mark.slow),
        pytest.param(SMALL, id="small"),
        pytest.param(TINY, id="tiny"),
    ],
)
def test_a_small_unet_is_that_of_diffusers(changes: dict[str, Any]) -> None:
    config = small_config(**changes)
    model = tiny_model(config)
    weights = {k: v for k, v in model.state_dict().items() if k.startswith("model.diffusion_model.")}
    settings = component_configs(model)["unet"]
    assert settings["mid_block_type"] == (
        None if "use_middle_block" in changes else "UNetMidBlock2DCrossAttn"
    )
    theirs = pytest.importorskip("diffusers").UNet2DConditionModel(**settings, sample_size=8).eval()
    theirs.load_state_dict(to_diffusers(weights)["unet"])
    x, context = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 64)
    with torch.no_grad():
        expected = theirs(x, torch.tensor([999, 3]), context).sample
    assert relative_error(model.apply_model(x, torch.tensor([999, 3]), context), expected) < 2e-5
    for names in (with_gaps, lambda key: key):
        found = to_compvis({names(key): tensor for key, tensor in weights.items()})
        assert found.keys() == weights.keys() and all(found[key] is weights[key] for key in weights)
    assert any(".input_blocks.7." in with_gaps(key) for key in weights)


SLOW = [pytest.param(form, marks=pytest.mark.slow) for form in ("diffusers", "compvis")]


@pytest.mark.parametrize("form", ["file", "gaps", *SLOW])
def test_a_small_unet_is_recognised(tmp_path: Path, small: tuple[Any, State], form: str) -> None:
    """From a file, a file as diffusers' script writes it, a folder, and a folder that became a file again."""
    config, weights = small
    path = saved(
        tmp_path / "m.ckpt", {(with_gaps(k) if form == "gaps" else k): v for k, v in weights.items()}
    )
    if form in ("diffusers", "compvis"):
        convert(read_model(path), tiny_config(), tmp_path / "m", "diffusers")
        path = tmp_path / "m"
    if form == "compvis":
        convert(read_model(path), tiny_config(), tmp_path / "m.safetensors", "compvis")
        path = tmp_path / "m.safetensors"
    checkpoint = read_model(path)
    assert suited(tiny_config(), checkpoint) == config
    assert all(torch.equal(checkpoint.state_dict[key], weights[key]) for key in weights)
    found = inspect_path(path, deep=False, config_for=lambda kind: tiny_config())[0]
    assert found.sound and found.fits and not found.unexpected, found.problem
    assert found.variants == ("a small U-Net: 3 levels of 1, without a middle block",)
    assert any("variant" in line and "3 levels of 1" in line for line in lines(found))


@pytest.fixture(scope="module")
def small() -> tuple[Any, State]:
    config = small_config(**TINY)
    return config, rebuilt_state_dict(build_model(config))


@pytest.mark.parametrize(
    "block", ["middle_block.", "input_blocks.5.", "input_blocks.11.", "output_blocks.3."]
)
def test_a_block_that_is_missing_from_a_whole_unet_is_an_error(
    weights: State, tmp_path: Path, block: str
) -> None:
    rest = {key: value for key, value in weights.items() if f"model.diffusion_model.{block}" not in key}
    path, config = saved(tmp_path / "m.ckpt", rest), tiny_config()
    assert suited(config, read_model(path)) is config
    with pytest.raises(CheckpointError, match=rf"lacks \d+ keys .*{block}"):
        load_model(config, path)


def test_a_small_unet_runs_as_packed_layers() -> None:
    """Blocks that are missing are missing in the fast network as well."""
    config = small_config(**TINY)
    plain, fast = tiny_model(config), tiny_model(config)
    prepare(fast, torch.float32, lambda weight: None)
    x, context = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 64)
    t = torch.tensor([500, 500])
    assert relative_error(fast.apply_model(x, t, context), plain.apply_model(x, t, context)) < 2e-5


@pytest.mark.long
def test_a_run_is_planned_and_estimated_for_the_small_unet(tmp_path: Path, small: tuple[Any, State]) -> None:
    config, weights = small
    (tmp_path / "tiny.yaml").write_text(json.dumps({"model": tiny_config()}))  # JSON is YAML
    options = RunOptions(
        outdir=str(tmp_path),
        ckpt=str(saved(tmp_path / "m.ckpt", weights)),
        config=str(tmp_path / "tiny.yaml"),
        device="cpu",
    )
    planned: list[Any] = []
    with pytest.raises(StopIteration):
        prepare_run(options, lambda model, find_lora: planned.append(model) or next(iter(())))
    assert planned == [config]
    works = [NetworkWork(build_model(model)).predict(64, 64).products for model in (config, tiny_config())]
    assert all(0 < works[0][kind] < 0.8 * works[1][kind] for kind in ("convolution", "matrix", "attention"))


# --- distilled models ---------------------------------------------------------------------------------------------

DISTILLED = {"time_cond_proj_dim": 16}


def test_a_guidance_scale_as_an_input_is_that_of_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    config = small_config(**TINY, **DISTILLED)
    model, fast = tiny_model(config), tiny_model(config)
    weights = {k: v for k, v in model.state_dict().items() if k.startswith("model.diffusion_model.")}
    theirs = diffusers.UNet2DConditionModel(**component_configs(model)["unet"], sample_size=8).eval()
    theirs.load_state_dict(to_diffusers(weights)["unet"])
    prepare(fast, torch.float32, lambda weight: None)
    x, context, t = (
        torch.randn(1, 4, 8, 8).repeat(2, 1, 1, 1),
        torch.randn(2, 5, 64),
        torch.tensor([499, 499]),
    )
    for scales in (torch.tensor([1.0, 7.5]), torch.tensor([3.0, 3.0])):
        embedded = diffusers.LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, scales - 1, 16)
        with torch.no_grad():
            expected = theirs(x, t, context, timestep_cond=embedded).sample
        for ours in (model, fast):
            found = ours.apply_model(x, t, {"c_crossattn": [context], "guidance": scales})
            assert relative_error(found, expected) < 2e-5
    assert relative_error(expected, model.apply_model(x, t, context)) > 1e-3


@pytest.mark.parametrize("form", ["file", *SLOW])
def test_a_distilled_model_runs_once_a_step(
    tmp_path: Path, form: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every layout; with each image's own scale, and a warning for negative prompts."""
    config = small_config(**TINY, **DISTILLED)
    path = saved(tmp_path / "m.ckpt", rebuilt_state_dict(build_model(config)))
    if form in ("diffusers", "compvis"):
        convert(read_model(path), tiny_config(), tmp_path / "m", "diffusers")
        path = tmp_path / "m"
    if form == "compvis":
        convert(read_model(path), tiny_config(), tmp_path / "m.safetensors", "compvis")
        path = tmp_path / "m.safetensors"
    model = load_model(tiny_config(), path)
    calls: list[tuple[int, list[float]]] = []
    own = model.apply_model

    def seen(x: Tensor, t: Tensor, cond: Any) -> Tensor:
        calls.append((len(x), cond["guidance"].tolist()))
        return own(x, t, cond)

    monkeypatch.setattr(model, "apply_model", seen)
    job = Job("a cat", negative_prompt="a dog", width=64, height=64, steps=2)
    pictures = Pipeline(model).make([replace(job, scale=scale, seed=4) for scale in (2.0, 8.0)])
    assert calls == [(2, [2.0, 8.0])] * 2
    assert (pictures[0].pixels != pictures[1].pixels).any()
    assert [record.message for record in caplog.records if "negative" in record.message] == [
        "this model was distilled with its guidance: negative prompts have no effect; leave them out"
    ]


def test_a_scale_for_a_unet_without_its_input_is_an_error(tiny: Any) -> None:
    with pytest.raises(InputError, match="no time_cond_proj_dim"):
        tiny.apply_model(
            torch.zeros(1, 4, 8, 8),
            torch.tensor([5]),
            {"c_crossattn": [torch.zeros(1, 5, 64)], "guidance": torch.tensor([2.0])},
        )


def test_a_schedule_that_begins_with_signal_is_named_for_a_model_without(
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = small_config(**TINY)
    config["params"].update(parameterization="v", zero_terminal_snr=True)
    pipeline = Pipeline(tiny_model(config))
    early = Job("a cat", width=64, height=64, schedule="original")
    pictures = pipeline.make([replace(early, steps=steps) for steps in (2, 3)])
    assert [picture.pixels.shape for picture in pictures] == [(64, 64, 3)] * 2
    (warning,) = [record.message for record in caplog.records if "without signal" in record.message]
    assert "at timestep 999, and the steps begin at 501" in warning and "trailing" in warning
