"""Finding and loading the safety model: the published layout on small weights, and files that are refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ldm.checkpoints.formats.detect import CheckpointError
from ldm.safety.load import _sizes, find_safety_model, load_safety_model
from ldm.safety.network import SafetyChecker
from tests.support.checkpoint_files import call, text, write_zip

SIZES = {"side": 28, "patch": 14, "width": 16, "layers": 2, "heads": 2, "inner": 24, "projection": 8}
CONFIG: dict[str, Any] = {
    "projection_dim": 8,
    "vision_config": {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "image_size": 28,
        "patch_size": 14,
        "hidden_act": "quick_gelu",
        "projection_dim": 512,
    },
}
POSITIONS = "vision_model.vision_model.embeddings.position_ids"
NORM = "vision_model.vision_model.pre_layrnorm.weight"


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(6)
    state = SafetyChecker(**SIZES).state_dict()
    return {
        key: tensor if key == POSITIONS else torch.randn(tensor.shape, generator=generator)
        for key, tensor in state.items()
    }


def save(folder: Path, state: dict[str, Tensor] | None = None, config: Any = CONFIG) -> Path:
    """Writes a folder in the published layout, with a safetensors file."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights() if state is None else state, folder / "model.safetensors")
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return folder


def assert_loaded(model: SafetyChecker) -> None:
    expected = weights()
    loaded = model.state_dict()
    assert set(loaded) == set(expected)
    assert all(torch.equal(loaded[key], tensor) for key, tensor in expected.items())
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert {t.dtype for key, t in loaded.items() if key != POSITIONS} == {torch.float32}
    reference = SafetyChecker(**SIZES).eval()
    reference.load_state_dict(expected)
    pictures = torch.randn(4, 3, 28, 28, generator=torch.Generator().manual_seed(7))
    torch.testing.assert_close(model.embed(pictures), reference.embed(pictures))


def test_a_folder_with_safetensors(tmp_path: Path) -> None:
    assert_loaded(load_safety_model(save(tmp_path / "m")))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_folder_with_a_bin_file(tmp_path: Path, zipped: bool) -> None:
    folder = save(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    torch.save(weights(), folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    assert_loaded(load_safety_model(folder))
    assert find_safety_model(folder) == folder / "pytorch_model.bin"


def test_a_single_file_with_a_config_beside_it(tmp_path: Path) -> None:
    folder = save(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "checker.safetensors")
    assert_loaded(load_safety_model(folder / "checker.safetensors"))


def test_safetensors_go_before_a_bin_file(tmp_path: Path) -> None:
    folder = save(tmp_path / "m")
    (folder / "pytorch_model.bin").write_bytes(b"not looked at")
    assert_loaded(load_safety_model(folder))


def test_position_ids_may_be_missing_and_halves_become_float32(tmp_path: Path) -> None:
    state = {key: tensor.half() for key, tensor in weights().items() if key != POSITIONS}
    loaded = load_safety_model(save(tmp_path / "m", state)).state_dict()
    assert loaded[POSITIONS].tolist() == [[0, 1, 2, 3, 4]]
    assert loaded[NORM].dtype == torch.float32 and torch.equal(loaded[NORM], state[NORM].float())


def test_without_a_config_the_sizes_are_those_of_v1(tmp_path: Path) -> None:
    folder = save(tmp_path / "m")
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"lacks 352 keys \(\S+\.layers\.2\.") as error:
        load_safety_model(folder)
    assert "\n" not in str(error.value)
    assert _sizes(folder / "config.json") == {}


def test_what_a_config_leaves_out_has_the_value_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps({"vision_config": {}}))
    default = transformers.CLIPVisionConfig()
    assert default.hidden_act == "quick_gelu"
    assert _sizes(tmp_path / "config.json") == {
        "side": default.image_size,
        "patch": default.patch_size,
        "width": default.hidden_size,
        "layers": default.num_hidden_layers,
        "heads": default.num_attention_heads,
        "inner": default.intermediate_size,
        "projection": transformers.CLIPConfig().projection_dim,
    }


def one_level_less(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.replace("vision_model.vision_model.", "vision_model."): state[key] for key in state}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda state: {k: v for k, v in state.items() if k != NORM}, rf"lacks 1 key \({NORM}\)"),
        (lambda state: {k: v for k, v in state.items() if "concept_embeds" not in k}, "lacks 2 keys"),
        (
            lambda state: {**state, NORM: torch.ones(17)},
            r"pre_layrnorm.weight has shape \[17\].*expects \[16\]",
        ),
        (lambda state: {**state, NORM: torch.ones(16, dtype=torch.int8)}, "int8"),
        (lambda state: {**state, "other\x1b.weight": torch.ones(1)}, r"other\\x1b.weight is not a weight of"),
        (one_level_less, r"vision_model\.embeddings\.\S+ is not a weight of the safety checker"),
    ],
)
def test_weights_that_do_not_fit_are_one_line(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], reason: str
) -> None:
    with pytest.raises(CheckpointError, match=reason) as error:
        load_safety_model(save(tmp_path / "m", change(weights())))
    assert str(error.value).startswith(str(tmp_path)) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ("{", "damaged"),
        ("[" * 100_000, "nested too deeply"),
        ([], "is not a JSON mapping"),
        ({"projection_dim": 8}, "vision_config is not a mapping"),
        ({**CONFIG, "projection_dim": "8"}, "projection_dim is '8'"),
        ({**CONFIG, "projection_dim": True}, "projection_dim is True"),
        ({**CONFIG, "vision_config": {**CONFIG["vision_config"], "image_size": [28, 28]}}, r"is \[28, 28\]"),
        ({**CONFIG, "vision_config": {**CONFIG["vision_config"], "num_hidden_layers": 10**9}}, "from 1 to"),
        ({**CONFIG, "vision_config": {**CONFIG["vision_config"], "num_attention_heads": 3}}, "no network"),
        ({**CONFIG, "vision_config": {**CONFIG["vision_config"], "patch_size": 29}}, "no network"),
        (
            {**CONFIG, "vision_config": {**CONFIG["vision_config"], "hidden_act": "gelu"}},
            "hidden_act is 'gelu'",
        ),
    ],
)
def test_configs_that_describe_no_safety_checker_are_one_line(
    tmp_path: Path, config: Any, reason: str
) -> None:
    with pytest.raises(CheckpointError, match=reason) as error:
        load_safety_model(save(tmp_path / "m", config=config))
    assert "config.json" in str(error.value) and "\n" not in str(error.value)


def test_a_pickle_that_wants_to_run_something_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "made"
    write_zip(tmp_path / "pytorch_model.bin", b"\x80\x02" + call("os", "mkdir", text(str(target))) + b".")
    with pytest.raises(CheckpointError, match="mkdir"):
        load_safety_model(tmp_path)
    assert not target.exists()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A computer without a safety model: empty home, toolkit and current folders."""
    for name in ("home", "toolkit", "here"):
        (tmp_path / name).mkdir()
    for name in ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("ldm.places.ROOT", tmp_path / "toolkit")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "home"


def snapshot(hub: Path, revision: str = "cb41f3a2") -> Path:
    return hub / "models--CompVis--stable-diffusion-safety-checker" / "snapshots" / revision


def test_no_model_anywhere_is_none(home: Path) -> None:
    assert find_safety_model() is None


@pytest.mark.parametrize(
    ("variable", "value", "hub"),
    [
        (None, "", "home/.cache/huggingface/hub"),
        ("XDG_CACHE_HOME", "cache", "cache/huggingface/hub"),
        ("HF_HOME", "hf", "hf/hub"),
        ("HF_HUB_CACHE", "hub", "hub"),
        ("HF_HUB_CACHE", "~/hub", "home/hub"),
        ("HUGGINGFACE_HUB_CACHE", "hub", "hub"),  # its older name
    ],
)
def test_the_hub_cache_is_looked_into(
    home: Path, monkeypatch: pytest.MonkeyPatch, variable: str | None, value: str, hub: str
) -> None:
    if variable:
        monkeypatch.setenv(variable, value if value.startswith("~") else str(home.parent / value))
    folder = save(snapshot(home.parent / hub, "b"))
    broken = snapshot(home.parent / hub, "a")
    broken.mkdir()
    os.symlink("nowhere", broken / "model.safetensors")
    assert find_safety_model() == folder / "model.safetensors"
    assert_loaded(load_safety_model(folder / "model.safetensors"))


@pytest.mark.parametrize("place", ["toolkit", "here"])
def test_the_own_folder_goes_first_and_must_be_usable(home: Path, place: str) -> None:
    save(snapshot(home / ".cache/huggingface/hub"))
    folder = home.parent / place / "models" / "safety_checker"
    folder.mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor pytorch"):
        find_safety_model()
    save(folder)
    found = find_safety_model()
    assert found is not None and found.samefile(folder / "model.safetensors")


def test_a_given_path_is_used_or_refused_whatever_else_there_is(home: Path) -> None:
    save(snapshot(home / ".cache/huggingface/hub"))
    folder = save(home / "mine")
    assert find_safety_model(str(folder)) == find_safety_model(folder / "model.safetensors")
    (home / "page.bin").write_text("<html>log in first</html>")
    for path, reason in (
        (home / "nothing", "no such file"),
        (home / "nothing.bin", "no such file"),
        (home / "page.bin", "is a web page"),
        (home.parent / "here", "holds no safety model"),
    ):
        with pytest.raises(CheckpointError, match=reason):
            find_safety_model(path)
