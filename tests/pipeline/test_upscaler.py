"""Networks that enlarge images: spandrel's own results in tiles, safe reading, the command and its replay."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import scripts.replay as replay
import scripts.txt2img as txt2img
from ldm.images.resample import enlarge_pixels
from ldm.job import Job
from ldm.pipeline import Pipeline
from ldm.pipeline.upscaler import load_upscaler
from ldm.util import InputError
from tests.support.golden_data import small_config, tiny_model, weight_of, written_model


@pytest.fixture(scope="module")
def spandrel() -> Any:
    """Without a torchvision that fits torch: spandrel needs it for two networks only, that are not used here."""
    with pytest.MonkeyPatch.context() as patch:
        try:
            import_module("torchvision")
        except (ImportError, RuntimeError):
            functional = ModuleType("torchvision.transforms.functional")
            vars(functional).update(InterpolationMode=None, rotate=None, normalize=None)
            for name in ("torchvision", "torchvision.transforms"):
                patch.setitem(sys.modules, name, ModuleType(name))
            patch.setitem(sys.modules, functional.__name__, functional)
        yield pytest.importorskip("spandrel")


@pytest.fixture(scope="module")
def file(spandrel: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small compact network (SRVGG), twice the size, in the wrapper of its authors' program."""
    from spandrel.architectures.Compact import Compact

    network = Compact(num_in_ch=3, num_out_ch=3, num_feat=8, num_conv=2, upscale=2, act_type="prelu")
    weights = {key: weight_of(key, tensor.shape) * 0.3 for key, tensor in network.state_dict().items()}
    folder = tmp_path_factory.mktemp("upscaler")
    torch.save({"params_ema": weights}, folder / "twice.pth")
    save_file(weights, folder / "twice.safetensors")
    return folder / "twice.pth"


def image(height: int = 40, width: int = 56) -> torch.Tensor:
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_it_is_spandrels_result(spandrel: Any, file: Path) -> None:
    theirs = spandrel.ModelLoader().load_from_file(file.with_suffix(".safetensors"))
    with torch.no_grad():
        expected = theirs((image() + 1) / 2).clamp(0, 1) * 2 - 1
    for path in (file, file.with_suffix(".safetensors")):
        upscaler = load_upscaler(str(path))
        assert upscaler.scale == 2
        assert torch.allclose(upscaler(image()), expected, atol=1e-6)


def test_its_memory_is_that_of_its_weights_and_maps(file: Path) -> None:
    """At least the largest map of the network at a time, at most all; and the enlarged image."""
    upscaler, maps = load_upscaler(str(file)), list[int]()
    network = upscaler._network.model
    weights = torch.load(file, weights_only=True)["params_ema"].values()
    assert upscaler.weight_bytes == 4 * sum(tensor.numel() for tensor in weights)
    hooks = [
        layer.register_forward_hook(lambda module, given, out: maps.append(out.numel()))
        for layer in network.body
    ]
    upscaler(image())
    for hook in hooks:
        hook.remove()
    enlarged = 3 * 3 * 80 * 112
    assert 4 * max(maps) <= upscaler.needed_memory((40, 56)) - 4 * enlarged <= 8 * sum(maps)
    assert upscaler.needed_memory((2000, 2000)) < 4 * 4 * 3 * 4000**2, "it works in tiles"


def test_esrgan_itself_is_known(spandrel: Any, tmp_path: Path) -> None:
    """RRDBNet, under the names of its authors' newer program."""
    from spandrel.architectures.ESRGAN import ESRGAN

    network = ESRGAN(num_filters=4, num_blocks=1, scale=4)
    torch.save(network.state_dict(), tmp_path / "four.pth")
    upscaler = load_upscaler(str(tmp_path / "four.pth"))
    assert upscaler.scale == 4
    assert upscaler.enlarge(np.zeros((12, 20, 3), np.uint8), torch.device("cpu")).shape == (48, 80, 3)


def test_tiles_leave_no_seam(spandrel: Any, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a tile lacks at its ends counts little: of the error without overlaps less than a tenth is left."""
    upscaler = load_upscaler(str(file))
    whole = upscaler(image(120, 150))
    monkeypatch.setattr("ldm.pipeline.upscaler._TILE", 64)
    tiled = upscaler(image(120, 150))
    monkeypatch.setattr("ldm.pipeline.upscaler._OVERLAP", 0)
    apart = upscaler(image(120, 150))
    assert tiled.shape == whole.shape
    assert 0 < (tiled - whole).abs().max() < 0.1 * (apart - whole).abs().max()


def test_nothing_in_a_pickle_is_run(spandrel: Any, tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "run",)

    torch.save({"params": Attack()}, tmp_path / "a.pth")
    with pytest.raises(InputError, match=r"a\.pth"):
        load_upscaler(str(tmp_path / "a.pth"))
    assert not (tmp_path / "run").exists()


def test_other_files_are_named(spandrel: Any, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3)}, tmp_path / "a.safetensors")
    with pytest.raises(
        InputError, match="is not a network that spandrel knows; give one that enlarges images"
    ):
        load_upscaler(str(tmp_path / "a.safetensors"))


def test_without_the_package_the_cure_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "spandrel", None)
    with pytest.raises(
        InputError, match=r"--upscaler needs the package spandrel.*pip install spandrel torchvision"
    ):
        load_upscaler("none.pth")


@pytest.mark.long
def test_finished_images_and_second_passes(spandrel: Any, file: Path) -> None:
    pipeline, job = Pipeline(tiny_model(small_config())), Job("a cat", width=64, height=64, steps=2, seed=3)
    twice = Job("a cat", width=64, height=64, steps=2, seed=3, upscale=1.5, upscale_strength=0.5)
    (plain,), (second,) = pipeline.make([job]), pipeline.make([twice])
    pipeline.use_upscaler(file)
    (larger,), (other,) = pipeline.make([job]), pipeline.make([twice])
    assert np.array_equal(larger.pixels, load_upscaler(str(file)).enlarge(plain.pixels, torch.device("cpu")))
    assert other.pixels.shape == (96, 96, 3) and not np.array_equal(other.pixels, second.pixels)
    pipeline.use_upscaler(None)
    assert np.array_equal(pipeline.make([job])[0].pixels, plain.pixels)


def test_a_start_of_the_second_pass_is_the_enlarged_image(spandrel: Any, file: Path) -> None:
    """At strength 0 the pass only encodes it."""
    pipeline = Pipeline(tiny_model(small_config()))
    pipeline.use_upscaler(file)
    job = Job("a cat", width=64, height=64, steps=2, seed=3, upscale=2.0, upscale_strength=0.0)
    (first,) = pipeline.make([Job("a cat", width=64, height=64, steps=2, seed=3)])
    decoded = pipeline.first_stage.decode(first.latent[None])
    larger = enlarge_pixels(load_upscaler(str(file))(decoded), 128, 128)
    expected = pipeline.model.get_first_stage_encoding(pipeline.first_stage.encode(larger).mode())
    assert torch.allclose(pipeline.make([job])[0].latent, expected[0], atol=1e-5)


@pytest.mark.long
def test_the_command_and_its_replay(
    spandrel: Any,
    file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    options = [*written_model(small_config()), "--device", "cpu", "--quiet"]
    typed = [
        "--prompt",
        "a cube",
        "--W",
        "64",
        "--H",
        "64",
        "--ddim_steps",
        "2",
        "--n_samples",
        "2",
        "--n_iter",
        "1",
    ]
    assert txt2img.main([*options, *typed, "--upscaler", str(file), "--outdir", "out"]) == 0
    made = Image.open("out/samples/00000.png")
    assert made.size == (128, 128) and len(list(Path("out").glob("grid*.png"))) == 1
    text = made.text["parameters"]
    assert "Upscaler: twice.pth" in text and "Upscaler hash: " in text
    assert replay.main(["out/samples/00000.png", "--verify", *options]) == 2
    assert "made with the Upscaler twice.pth; give it with --upscaler" in capsys.readouterr().err
    assert replay.main(["out/samples/00000.png", "--verify", "--upscaler", str(file), *options]) == 0
    assert "identical" in capsys.readouterr().out
    assert txt2img.main([*options, *typed, "--upscaler", "none.pth"]) == 2
    assert "none.pth" in capsys.readouterr().err.splitlines()[-1]
