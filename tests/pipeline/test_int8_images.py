"""--precision int8 with LoRAs, in batches, in tiles and in a replay, against bf16 and changed weights."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import scripts.replay
import scripts.txt2img
from ldm.checkpoints.configs import BUNDLED_CKPT, BUNDLED_CONFIG
from ldm.config import read_config
from ldm.job import Job
from ldm.metadata.read import read_job
from ldm.pipeline import Pipeline, load_model
from ldm.runtime.device import resolve_precision
from tests.support.precision import needs_int8_kernels
from tests.support.scripts import FAST

pytestmark = [needs_int8_kernels, pytest.mark.long]
LAYERS = {  # in the middle block: kohya's names, and CompVis's
    "resnets_0_conv1": "middle_block.0.in_layers.2",
    "attentions_0_transformer_blocks_0_attn1_to_q": "middle_block.1.transformer_blocks.0.attn1.to_q",
    "attentions_0_transformer_blocks_0_ff_net_2": "middle_block.1.transformer_blocks.0.ff.net.2",
}
JOB = Job("a red cube", width=64, height=64, steps=3, scale=2.0, sampler="dpm_solver")


def pipeline(precision: str, **options) -> Pipeline:
    model = load_model(read_config(BUNDLED_CONFIG), BUNDLED_CKPT)
    return Pipeline(model, resolve_precision(precision, torch.device("cpu")), **options)


def pixels(maker: Pipeline, *jobs: Job) -> list[np.ndarray]:
    return [image.pixels for image in maker.make(jobs or [JOB])]


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return 10 * math.log10(255**2 / max(float(np.square(a.astype(float) - b).mean()), 1e-9))


@pytest.fixture(scope="module")
def rounded() -> Pipeline:
    return pipeline("int8")


def write_lora(path: Path, network: nn.Module) -> dict[str, torch.Tensor]:
    """Writes a LoRA of rank 2 and alpha 1 on three layers; returns what it adds to their weights at strength 1."""
    state, changes = {}, {}
    for i, (name, key) in enumerate(LAYERS.items()):
        shape = network.get_parameter(f"{key}.weight").shape
        generator = torch.Generator().manual_seed(i)
        down = torch.randn(2, *shape[1:], generator=generator) / math.sqrt(math.prod(shape[1:]))
        up = torch.randn(shape[0], 2, *[1] * (len(shape) - 2), generator=generator)
        name = f"lora_unet_mid_block_{name}"
        state |= {
            f"{name}.lora_down.weight": down,
            f"{name}.lora_up.weight": up,
            f"{name}.alpha": torch.tensor(1.0),
        }
        changes[key] = (up.flatten(1) @ down.flatten(1)).view(shape) / 2
    save_file(state, path)
    return changes


def test_a_lora_is_in_the_weights_before_they_are_rounded(rounded: Pipeline, tmp_path: Path) -> None:
    network = rounded.model.model.diffusion_model
    changes = write_lora(tmp_path / "middle.safetensors", network)
    (plain,) = pixels(rounded)
    (changed,) = pixels(rounded, replace(JOB, loras=((str(tmp_path / "middle.safetensors"), 0.7, 0.7),)))
    assert not np.array_equal(changed, plain)
    assert np.array_equal(pixels(rounded)[0], plain)
    other = pipeline("int8")
    for key, change in changes.items():
        weight = other.model.model.diffusion_model.get_parameter(f"{key}.weight")
        with torch.no_grad():
            weight.copy_(weight.float() + 0.7 * change)
    assert np.array_equal(pixels(other)[0], changed)


def test_an_image_is_nearly_the_same_in_another_batch(rounded: Pipeline) -> None:
    """The range of an input is that of its batch, and a blue image widens that of a red one."""
    jobs = [
        JOB,
        replace(JOB, prompt="a blue sphere", seed=7),
        replace(JOB, prompt="a tiny green cone", seed=8),
    ]
    together, alone = pixels(rounded, *jobs), [pixels(rounded, job)[0] for job in jobs]
    exact = pixels(pipeline("bf16"), *jobs)
    for i in range(3):
        assert psnr(together[i], alone[i]) > 25
        assert psnr(together[i], exact[i]) > 25 > 20 > psnr(together[i], exact[i - 1])


def test_tiles_change_as_little_as_in_bf16() -> None:
    """Tiles are the decoder's, which 8 bits leave alone: a wide image, cut and whole, in both."""
    job = replace(JOB, width=640, steps=1, scale=1.0)
    apart = {
        precision: psnr(*(pixels(pipeline(precision, tiles=tiles), job)[0] for tiles in ("off", "on")))
        for precision in ("int8", "bf16")
    }
    assert 20 < apart["int8"] < 60
    assert apart["int8"] == pytest.approx(apart["bf16"], abs=3)


def test_a_replay_is_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    options = [*FAST, "--n_samples", "2", "--prompt", "a red cube", "--cache_steps", "2", "--outdir", "out"]
    assert scripts.txt2img.main([*options, "--precision", "int8"]) == 0
    assert scripts.replay.main(["out/samples/00001.png", "--verify", "--quiet"]) == 0
    assert "identical: all" in capsys.readouterr().out
    assert read_job("outputs/replay/00001.png").extras["Precision"] == "int8"
    assert scripts.replay.main(["out/samples/00001.png", "--verify", "--precision", "bf16", "--quiet"]) == 1
    assert "different" in capsys.readouterr().out
