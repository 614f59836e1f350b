"""TAESD: the figures of its author's code, diffusers' AutoencoderTiny, and every layout of its files."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import scripts.txt2img as txt2img
from ldm.checkpoints.convert import convert
from ldm.checkpoints.formats.detect import CheckpointError
from ldm.checkpoints.hashing import file_sha256
from ldm.checkpoints.inspect import inspect_path
from ldm.checkpoints.model_files import read_model
from ldm.metadata.infotext import parse_infotext
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.diffusionmodules.taesd import TAESDDecoder, TAESDEncoder
from ldm.pipeline import load_model
from tests.support.golden_data import (
    TOLERANCE,
    figure,
    keys,
    relative_error,
    small_config,
    tiny_model,
    weight_of,
)
from tests.support.scripts import FAST

NETWORKS = {"encoder": TAESDEncoder, "decoder": TAESDDecoder}
FIGURES = {"encoder": ("image", "latent_of_image"), "decoder": ("latent", "image_of_latent")}


@pytest.mark.parametrize("half", NETWORKS)
def test_the_author_s_keys_and_figures(half: str) -> None:
    network = NETWORKS[half]()
    state = network.state_dict()
    assert {key: list(value.shape) for key, value in state.items()} == keys("keys_taesd.json")[half]
    network.load_state_dict(
        {key: weight_of(f"taesd_{half}.{key}", value.shape) for key, value in state.items()}
    )
    given, expected = (figure(name, "taesd.npz") for name in FIGURES[half])
    with torch.inference_mode():
        assert relative_error(network(given), expected) < TOLERANCE


class Files:
    """One TAESD of random weights in every layout, diffusers' own class with them, and a model that lacks it."""

    def __init__(self, folder: Path) -> None:
        from diffusers import AutoencoderTiny

        torch.manual_seed(0)
        self.tiny: Any = AutoencoderTiny().eval()
        self.halves = {
            "encoder": {k[8:].removeprefix("layers."): v for k, v in self._of("encoder.").items()},
            "decoder": {
                _one_higher(k[8:].removeprefix("layers.")): v for k, v in self._of("decoder.").items()
            },
        }
        both = {f"taesd_{half}.{key}": v for half, state in self.halves.items() for key, v in state.items()}
        self.model = folder / "small.ckpt"
        torch.save({"state_dict": tiny_model(small_config()).state_dict()}, self.model)
        self.of_author = folder / "author"
        self.of_author.mkdir()
        for half, state in self.halves.items():
            torch.save(state, self.of_author / f"taesd_{half}.pth")
        self.tiny.save_pretrained(folder / "diffusers")
        save_file(both, folder / "both.safetensors")
        self.whole = {
            "the author's, in a folder": self.of_author,
            "both in one file": folder / "both.safetensors",
            "a folder of diffusers": folder / "diffusers",
            "a file of diffusers": folder / "diffusers/diffusion_pytorch_model.safetensors",
        }

    def _of(self, half: str) -> dict[str, torch.Tensor]:
        return {key: value for key, value in self.tiny.state_dict().items() if key.startswith(half)}

    def loaded(self, vae: Path | None) -> LatentDiffusion:
        return load_model(small_config(), self.model, vae=vae)


def _one_higher(key: str) -> str:
    layer, _, rest = key.partition(".")
    return f"{int(layer) + 1}.{rest}"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    pytest.importorskip("diffusers")
    return Files(tmp_path_factory.mktemp("taesd"))


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    return 2 * figure("image", "taesd.npz") - 1


LATENTS = torch.randn(1, 4, 6, 8, generator=torch.Generator().manual_seed(1)) * 2


@torch.inference_mode()
@pytest.mark.parametrize(
    "layout",
    ["the author's, in a folder", "both in one file", "a folder of diffusers", "a file of diffusers"],
)
def test_each_layout_computes_what_diffusers_does(files: Files, image: torch.Tensor, layout: str) -> None:
    model = files.loaded(files.whole[layout])
    encoded = model.get_first_stage_encoding(model.encode_first_stage(image).mode())
    assert relative_error(encoded, files.tiny.encode(image).latents) < 1e-6
    assert relative_error(model.decode_first_stage(LATENTS), files.tiny.decode(LATENTS).sample) < 1e-6


@torch.inference_mode()
@pytest.mark.parametrize("half", ["decoder", "encoder"])
def test_half_of_it_leaves_the_other_half_to_the_model(files: Files, image: torch.Tensor, half: str) -> None:
    model, own = files.loaded(files.of_author / f"taesd_{half}.pth"), files.loaded(None)
    decoded, encoded = model.decode_first_stage(LATENTS), model.encode_first_stage(image).mode()
    if half == "decoder":
        assert torch.equal(encoded, own.encode_first_stage(image).mode())
        assert relative_error(decoded, files.tiny.decode(LATENTS).sample) < 1e-6
    else:
        assert torch.equal(decoded, own.decode_first_stage(LATENTS))
        assert relative_error(model.scale_factor * encoded, files.tiny.encode(image).latents) < 1e-6


@pytest.mark.long
@torch.inference_mode()
def test_a_whole_model_with_it_is_converted(files: Files, image: torch.Tensor, tmp_path: Path) -> None:
    from diffusers import AutoencoderTiny

    with_it = read_model(files.model, vae=files.of_author)
    expected = files.tiny.decode(LATENTS).sample
    for to, out in (("compvis", tmp_path / "whole.safetensors"), ("diffusers", tmp_path / "folder")):
        convert(with_it, small_config(), out, to)  # type: ignore[arg-type]
        again = load_model(small_config(), out)
        assert relative_error(again.decode_first_stage(LATENTS), expected) < 1e-6
    theirs: Any = AutoencoderTiny.from_pretrained(tmp_path / "folder/vae").eval()
    assert torch.equal(theirs.decode(LATENTS).sample, expected)


def test_diffusers_has_no_place_for_half_of_it(files: Files, tmp_path: Path) -> None:
    half = read_model(files.model, vae=files.of_author / "taesd_decoder.pth")
    with pytest.raises(
        CheckpointError, match="no place for an autoencoder of which only the decoder is TAESD"
    ):
        convert(half, small_config(), tmp_path / "folder", "diffusers")
    convert(half, small_config(), tmp_path / "whole.safetensors", "compvis")
    again = load_model(small_config(), tmp_path / "whole.safetensors").first_stage_model
    assert again.halves == ("decoder",)


def test_it_is_recognised(files: Files) -> None:
    for path, layout in (
        (files.of_author / "taesd_decoder.pth", "TAESD"),
        (files.of_author / "taesd_encoder.pth", "TAESD"),
        (files.whole["both in one file"], "TAESD"),
        (files.whole["a file of diffusers"], "diffusers TAESD"),
    ):
        (found,) = inspect_path(path, deep=False)
        assert (found.kind.part, found.kind.layout) == ("autoencoder", layout)
        assert set(found.parameters) == {"autoencoder"}


@pytest.mark.long
def test_what_does_not_fit_is_named(files: Files, tmp_path: Path) -> None:
    decoder = files.halves["decoder"]
    for name, state, fault in (
        ("channels", {**decoder, "1.weight": torch.zeros(64, 16, 3, 3)}, r"has shape \[64, 16, 3, 3\]"),
        ("pooling", {**decoder, "18.pool.0.weight": torch.zeros(64, 64, 1, 1)}, "pooling norm"),
        ("damaged", {k: v for k, v in decoder.items() if not k.startswith("10.")}, r"decoder\.10\.conv"),
    ):
        torch.save(state, tmp_path / f"{name}.pth")
        with pytest.raises(CheckpointError, match=fault):
            files.loaded(tmp_path / f"{name}.pth")


def test_a_model_without_the_other_half_is_refused(files: Files, tmp_path: Path) -> None:
    state = {k: v for k, v in torch.load(files.model)["state_dict"].items() if "first_stage" not in k}
    torch.save(state, tmp_path / "parts.ckpt")
    with pytest.raises(CheckpointError, match=r"first_stage_model\.encoder"):
        load_model(small_config(), tmp_path / "parts.ckpt", vae=files.of_author / "taesd_decoder.pth")
    shutil.copy(files.of_author / "taesd_decoder.pth", tmp_path / "taesd_decoder.pth")
    with pytest.raises(CheckpointError, match=r"first_stage_model\.encoder"):
        load_model(small_config(), tmp_path / "parts.ckpt", vae=tmp_path)


def test_images_record_it(files: Files, tmp_path: Path) -> None:
    decoder, out = files.of_author / "taesd_decoder.pth", tmp_path / "out"
    how = ["--vae", str(decoder), "--outdir", str(out), "--safety", "off"]
    assert txt2img.main([*FAST, *how]) == 0
    with Image.open(out / "samples/00000.png") as image:
        entries = parse_infotext(image.text["parameters"])  # type: ignore[attr-defined]
    assert (entries["VAE"], entries["VAE hash"]) == ("taesd_decoder.pth", file_sha256(decoder)[:10])
    assert entries["VAE Decoder"] == "TAESD" and "VAE Encoder" not in entries
