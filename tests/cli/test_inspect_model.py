"""The inspection script: what it prints, and its exit codes."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ldm.checkpoints.configs import BUNDLED_CKPT, BUNDLED_CONFIG, INPAINTING_CONFIG, LAION_CONFIG, V1_CONFIG
from ldm.checkpoints.layouts.recognise import kind_of
from ldm.cli.commands import convert
from ldm.cli.commands import inspect as inspect_model
from tests.support.checkpoint_files import call, text, write_zip
from tests.support.golden_data import keys
from tests.support.paths import ROOT

EVIL = b"\x80\x02" + call("os", "system", text("false")) + b"."


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_the_bundled_model_needs_no_config(capsys):
    assert inspect_model.main([str(ROOT / BUNDLED_CKPT), "--no_hash"]) == 0
    assert re.search(r"^ *loads +yes$", capsys.readouterr().out, re.MULTILINE)


def test_the_bundled_model_loads(capsys):
    code = inspect_model.main([BUNDLED_CKPT, "--config", BUNDLED_CONFIG])
    shown = capsys.readouterr()
    rows = dict(line.strip().split(maxsplit=1) for line in shown.out.splitlines() if "  " in line)
    assert code == 0 and rows["loads"] == "yes" and "float16" in rows["precision"]
    assert "checksum" in shown.err and "damage" in shown.err


def test_one_json_object_a_file(tmp_path, capsys):
    torch.save({"a": torch.ones(2)}, tmp_path / "a.ckpt")
    write_zip(tmp_path / "evil.ckpt", EVIL)
    code = inspect_model.main(["--json", "--quiet", str(tmp_path / "a.ckpt"), str(tmp_path / "evil.ckpt")])
    shown = capsys.readouterr()
    good, evil = (json.loads(line) for line in shown.out.splitlines())
    assert code == 1 and shown.err == ""
    assert good["refused"] == "" and good["parameters"] == {"other": 2}
    assert evil["foreign"] == ["os.system"] and "refused, nothing was run" in evil["refused"]


@pytest.mark.parametrize("quick", [False, True])
def test_exit_codes(tmp_path, capsys, quick):
    good, bad, none = tmp_path / "good.ckpt", tmp_path / "bad.ckpt", tmp_path / "none.ckpt"
    torch.save({"a": torch.ones(2)}, good)
    torch.save({"a": torch.tensor(float("nan"))}, bad)
    option = ["--no_hash"] * quick
    assert inspect_model.main([str(good), *option]) == 0
    assert inspect_model.main([str(bad), str(good), *option]) == (0 if quick else 1)
    capsys.readouterr()
    assert inspect_model.main([str(none), str(good), *option]) == 2
    shown = capsys.readouterr()
    assert f"error: {none}: no such file" in shown.err and "good.ckpt" in shown.out
    assert ("SHA-256" in shown.out) is not quick


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("keys_v1.json", V1_CONFIG),
        ("keys_v1_ema.json", V1_CONFIG),
        ("keys_inpaint.json", INPAINTING_CONFIG),
        ("keys_laion400m.json", LAION_CONFIG),
    ],
)
def test_a_published_kind_is_compared_with_its_own_config(name, config):
    state_dict = {key: torch.empty(shape, device="meta") for key, shape in keys(name).items()}
    assert inspect_model.own_config(kind_of(state_dict), Path("not-read.ckpt")) == config
    unet = {key: tensor for key, tensor in state_dict.items() if key.startswith("model.")}
    assert inspect_model.own_config(kind_of(unet), Path("not-read.ckpt")) is None


def test_another_models_config_is_a_misfit(capsys):
    assert inspect_model.main([BUNDLED_CKPT, "--config", V1_CONFIG, "--no_hash"]) == 1
    assert re.search(r"loads +no: .*model\.ckpt: lacks \d+ keys \(model\.", capsys.readouterr().out)


def test_a_folder_is_compared_as_a_whole(tmp_path, capsys):
    folder = tmp_path / "shapes"
    assert convert.main([str(ROOT / BUNDLED_CKPT), str(folder), "--quiet"]) == 0
    assert inspect_model.main([str(folder), "--config", BUNDLED_CONFIG, "--no_hash", "--json"]) == 0
    whole, *parts = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert whole["fits"] is True and [part["fits"] for part in parts] == [None] * 3
    assert inspect_model.main([str(folder), "--config", V1_CONFIG, "--no_hash"]) == 1


def test_help_is_quick_and_needs_nothing():
    code = "import sys, scripts.inspect_model as s; s.parser().format_help(); print('torch' in sys.modules)"
    child = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert child.stdout == "False\n"
