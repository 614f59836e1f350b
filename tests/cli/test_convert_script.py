"""Converting on the command line, and images from the converted models."""

from __future__ import annotations

import errno
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import scripts.txt2img as txt2img
from ldm.checkpoints import configs
from ldm.checkpoints.formats import write
from ldm.checkpoints.formats.read import read_checkpoint
from ldm.checkpoints.hashing import file_sha256
from ldm.checkpoints.layouts.recognise import ema_key
from ldm.cli.commands import convert
from ldm.cli.values import options_of
from ldm.metadata.infotext import parse_infotext
from ldm.runs.models import choose_model
from tests.support.paths import ROOT
from tests.support.scripts import FAST

CONFIG = str(ROOT / "configs/shapes/shapes-inference.yaml")
CKPT = str(ROOT / "models/ldm/shapes/model.ckpt")
FULL = ["--precision", "full"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model in the layout of diffusers."""
    out = tmp_path_factory.mktemp("converted") / "shapes v1.0"
    assert convert.run(convert.parser().parse_args([CKPT, str(out), "--config", CONFIG])) == 0
    return out


def generate(tmp_path: Path, ckpt: object, *others: object) -> tuple[np.ndarray, dict[str, str]]:
    """Pixels and metadata of one image."""
    out = tmp_path / "out"
    arguments = ["--config", CONFIG, "--ckpt", ckpt, "--outdir", out, *FULL, *others]
    assert txt2img.main([*FAST, *map(str, arguments)]) == 0
    (path,) = (out / "samples").glob("*.png")
    picture = Image.open(path)
    pixels, text = np.asarray(picture, dtype=int), picture.text["parameters"]  # type: ignore[attr-defined]
    shutil.rmtree(out)
    return pixels, parse_infotext(text)


def test_a_folder_draws_the_same_picture(tmp_path: Path, folder: Path) -> None:
    expected, _ = generate(tmp_path, CKPT)
    pixels, entries = generate(tmp_path, folder)
    assert np.abs(pixels - expected).max() <= 1
    assert entries["Model"] == "shapes v1.0" and re.fullmatch("[0-9a-f]{10}", entries["Model hash"])
    assert "VAE" not in entries and "Text encoder" not in entries


@pytest.mark.long
def test_every_output_draws_the_same_picture(tmp_path: Path, folder: Path) -> None:
    expected, _ = generate(tmp_path, CKPT)
    for name in ("a.safetensors", "a.ckpt"):
        assert convert.main([str(folder), str(tmp_path / name), "--config", CONFIG, "--quiet"]) == 0
        assert np.abs(generate(tmp_path, tmp_path / name)[0] - expected).max() <= 1


@pytest.mark.long
@pytest.mark.parametrize("how", ["averages only", "wrapped and nested"])
def test_unusual_files_draw_the_same_image(tmp_path: Path, how: str) -> None:
    """The bundled model, which is in half precision, as other trainers save it."""
    state = {key: tensor.clone() for key, tensor in read_checkpoint(CKPT).state_dict.items()}
    if how == "averages only":
        tree: Any = {
            ema_key(key) if key.startswith("model.") else key: tensor for key, tensor in state.items()
        }
        assert not any(key.startswith("model.") for key in tree)
    else:
        tree = {"state_dict": {"state_dict": {f"module._orig_mod.{key}": t for key, t in state.items()}}}
    torch.save(tree, tmp_path / "other.ckpt")
    assert (generate(tmp_path, tmp_path / "other.ckpt")[0] == generate(tmp_path, CKPT)[0]).all()


def test_replaced_parts_are_recorded(tmp_path: Path, folder: Path) -> None:
    """An autoencoder whose output is always black."""
    state = read_checkpoint(folder / "vae" / "diffusion_pytorch_model.safetensors").state_dict
    black = {key: tensor.clone() for key, tensor in state.items()}
    black["decoder.conv_out.weight"].zero_()
    black["decoder.conv_out.bias"].fill_(-1)
    torch.save(black, tmp_path / "black.pt")
    pixels, entries = generate(
        tmp_path, CKPT, "--vae", tmp_path / "black.pt", "--text_encoder", folder, "--no_watermark"
    )
    assert pixels.max() == 0
    assert entries["VAE"] == "black.pt" and entries["Text encoder"] == "shapes v1.0"
    assert entries["VAE hash"] == file_sha256(tmp_path / "black.pt")[:10]
    assert entries["Text encoder hash"] == file_sha256(folder / "text_encoder" / "model.safetensors")[:10]
    assert entries["Model hash"] == file_sha256(CKPT)[:10]


def test_precision_and_parts_are_written(tmp_path: Path, folder: Path) -> None:
    out = tmp_path / "a.safetensors"
    how = ["--config", CONFIG, "--dtype", "bf16", "--vae", str(folder / "vae"), "--quiet"]
    assert convert.main([CKPT, str(out), *how]) == 0
    state = read_checkpoint(out).state_dict
    key = "first_stage_model.quant_conv.weight"
    assert state[key].dtype == torch.bfloat16 and state["betas"].dtype == torch.float32
    assert torch.equal(state[key], read_checkpoint(CKPT).state_dict[key].bfloat16())


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["none.ckpt", "a.safetensors"], "none.ckpt does not exist; give another model as IN"),
        ([CKPT, CKPT], "exists already, and nothing is overwritten"),
        ([CKPT, "a", "--to", "compvis"], "name it so"),
        ([CKPT, "a.ckpt", "--to", "diffusers"], "is a folder; name one"),
        ([CKPT, "a", "--ema", "both"], "one set of weights"),
        ([CKPT, "a", "--config", CONFIG, "--ema", "on"], "has no EMA weights"),
        ([CKPT, "no/such/a.ckpt"], "is not a folder; make it first"),
        ([CKPT, "a", "--vae", "none.pt"], "give another --vae"),
        ([CKPT, "a", "--config", configs.V1_CONFIG], "keys (model.diffusion_model.input_blocks.1.1"),
        ([CKPT, "a", "--to", "onnx"], "'onnx' is unknown; choose compvis, diffusers or ckpt"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: Any,
    reason: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        code = convert.main([*arguments, "--quiet"])
    except SystemExit as ended:  # by argparse
        code = ended.code
    said = capsys.readouterr().err
    assert code == 2 and said.startswith("error: ") and said.count("\n") == 1 and reason in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a.ckpt", "a.safetensors", "a"])
def test_a_full_disk_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    def full(tensors: object, *_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", full)
    monkeypatch.setattr(write, "_header", full)
    out = tmp_path / name
    assert convert.main([CKPT, str(out), "--config", CONFIG, "--quiet"]) == 1
    assert capsys.readouterr().err == f"error: {out}: No space left on device\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("channels", "config"), [(4, configs.V1_CONFIG), (9, configs.INPAINTING_CONFIG)])
def test_the_config_is_chosen_by_content(tmp_path: Path, folder: Path, channels: int, config: str) -> None:
    shutil.copytree(folder, tmp_path / "folder")
    weights = tmp_path / "folder" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    first = {
        "conv_in.weight": torch.ones(8, channels, 3, 3),
        "down_blocks.0.resnets.0.norm1.weight": torch.ones(8),
    }
    torch.save(first, weights.with_suffix(".bin"))
    chosen, _ = choose_model(options_of(txt2img.parser().parse_args(["--ckpt", str(tmp_path / "folder")])))
    assert chosen.absolute() == ROOT / config


def test_a_folder_that_does_not_fit_the_config_is_named(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--ckpt", str(folder), "--config", configs.V1_CONFIG, "--outdir", str(tmp_path / "out")]
    assert txt2img.main([*FAST, *asked]) == 2
    said = capsys.readouterr().err
    assert "its unet has block_out_channels [64, 128, 128]" in said and "[320, 640, 1280, 1280]" in said
