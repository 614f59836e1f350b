"""Weighted sums, added differences, merged and extracted LoRAs, against closed forms."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm.checkpoints.adapters.lora_factors import factors_of
from ldm.checkpoints.mixing import Addition, mixed
from ldm.util import InputError
from scripts.convert import main
from tests.support.golden_data import relative_error
from tests.support.paths import ROOT

BUNDLED = str(ROOT / "models/ldm/shapes/model.ckpt")
UNET, TEXT = "model.diffusion_model.", "cond_stage_model.transformer."
DEEP = UNET + "input_blocks.3.1.transformer_blocks.0.attn1.to_q.weight"
WIDE = UNET + "input_blocks.1.0.in_layers.2.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The bundled model in float32, and one that differs from it by a matrix of rank 2 and by one of full rank."""
    folder = tmp_path_factory.mktemp("models")
    assert main([BUNDLED, str(folder / "base.safetensors"), "--dtype", "fp32", "--quiet"]) == 0
    base = load_file(folder / "base.safetensors")
    generator = torch.Generator().manual_seed(0)
    rows, columns = base[DEEP].shape
    low = torch.randn(rows, 2, generator=generator) @ torch.randn(2, columns, generator=generator)
    full = torch.randn(base[WIDE].shape, generator=generator)
    tuned = {**base, DEEP: base[DEEP] + 0.01 * low, WIDE: base[WIDE] + 0.01 * full}
    save_file(tuned, folder / "tuned.safetensors")
    return folder, base, tuned


def test_factors_are_the_best_of_their_rank():
    change = torch.randn(12, 5, 3, 3, generator=torch.Generator().manual_seed(1))
    down, up = factors_of(change, 4)
    assert (down.shape, up.shape) == ((4, 5, 3, 3), (12, 4, 1, 1))
    values = np.linalg.svd(change.flatten(1).double().numpy(), compute_uv=False)
    error = torch.linalg.norm(up.flatten(1) @ down.flatten(1) - change.flatten(1))
    assert float(error) == pytest.approx(float(np.sqrt((values[4:] ** 2).sum())), rel=1e-5)


def test_an_extracted_lora_makes_the_tuned_model_of_the_base(models, tmp_path):
    folder, base, tuned = models
    out = str(tmp_path / "lora.safetensors")
    options = ["--extract_lora", str(folder / "base.safetensors"), "--rank", "2", "--conv_rank", "999"]
    assert main([str(folder / "tuned.safetensors"), out, *options, "--dtype", "fp32", "--quiet"]) == 0
    assert len(load_file(out)) == 2 * 3  # two layers differ
    merged = str(tmp_path / "merged.safetensors")
    assert main([str(folder / "base.safetensors"), merged, "--lora", out, "--quiet"]) == 0
    found = load_file(merged)
    for key in (DEEP, WIDE):
        assert relative_error(found[key] - base[key], tuned[key] - base[key]) < 1e-5
    assert all(torch.equal(found[key], base[key]) for key in base if key not in (DEEP, WIDE))
    small = str(tmp_path / "small.safetensors")
    assert main([out, small, "--resize_lora", "--rank", "1", "--quiet"]) == 0
    ranks = {value.shape[0] for key, value in load_file(small).items() if key.endswith("down.weight")}
    assert ranks == {1}


def test_weighted_sums_and_differences(models, tmp_path):
    folder, base, tuned = models
    paths = {name: str(folder / f"{name}.safetensors") for name in ("base", "tuned")}
    assert (
        main([paths["base"], str(tmp_path / "sum.safetensors"), "--add", f"{paths['tuned']}:0.25", "--quiet"])
        == 0
    )
    found = load_file(tmp_path / "sum.safetensors")
    assert torch.allclose(found[DEEP], 0.75 * base[DEEP] + 0.25 * tuned[DEEP], atol=1e-6)
    options = ["--add", paths["tuned"], "--subtract", paths["base"], "--quiet"]
    assert main([paths["tuned"], str(tmp_path / "more.safetensors"), *options]) == 0
    found = load_file(tmp_path / "more.safetensors")
    assert torch.allclose(found[WIDE], 2 * tuned[WIDE] - base[WIDE], atol=1e-6)
    assert torch.equal(found["betas"], base["betas"])


def test_blocks_have_weights_of_their_own():
    keys = [
        UNET + "time_embed.0.weight",
        UNET + "input_blocks.4.0.x.weight",
        UNET + "middle_block.1.x.weight",
    ]
    keys += [UNET + "output_blocks.11.0.x.weight", TEXT + "a.weight", "first_stage_model.a.weight"]
    own, other = ({key: torch.full((2,), value) for key in keys} for value in (0.0, 1.0))
    blocks = [0.5, *(i / 100 for i in range(25))]
    found = [float(value[0]) for value in mixed(own, Addition(other, None, 0.9, blocks)).values()]
    assert found == pytest.approx([0.5, 0.04, 0.12, 0.24, 0.5, 0.9])
    with pytest.raises(InputError, match="3 block weights were given; give 26"):
        Addition(other, None, 1.0, (1, 2, 3))


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--subtract", "x"], "--subtract and --block_weights belong to --add"),
        (["--add", BUNDLED], "with the weight 1 is that model itself; give a weight"),
        (["--add", "none.ckpt:0.5"], "none.ckpt does not exist; give another model with --add"),
        (["--add", "a:0.5", "--resize_lora"], "write different things; give one of them"),
        (["--extract_lora", BUNDLED], "the two models do not differ in any layer"),
        (["--extract_lora", BUNDLED, "--rank", "0"], "--rank 0: give 1 or more"),
    ],
    ids=str,
)
def test_what_is_wrong_is_one_line(options, line, tmp_path, capsys):
    assert main([BUNDLED, str(tmp_path / "out.safetensors"), *options, "--quiet"]) == 2
    assert line in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out.safetensors").exists()


def test_other_models_are_not_added():
    own = {UNET + "a.weight": torch.zeros(2)}
    with pytest.raises(InputError, match="a model that is added lacks 1 key"):
        mixed(own, Addition({}, None, 0.5))
    with pytest.raises(InputError, match=r"of shape \[3\] instead of \[2\]"):
        mixed(own, Addition({UNET + "a.weight": torch.zeros(3)}, None, 0.5))
