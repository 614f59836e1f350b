"""Files that are recreated share a model, one at a time, and nothing else."""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image

import ldm.pipeline
import scripts.img2img
import scripts.replay
import scripts.txt2img
from ldm.checkpoints.configs import BUNDLED_CKPT, BUNDLED_CONFIG
from ldm.cli.run import run
from ldm.data.scenes import image_at
from ldm.places import ROOT
from ldm.runs.model_cache import ModelCache
from tests.support.models import SHARED_MODELS

FAST = ["--ddim_steps", "2", "--device", "cpu", "--quiet", "--skip_grid", "--n_samples", "1", "--n_iter", "1"]

LOAD_MODEL = ldm.pipeline.load_model
Made = Callable[..., Path]
Loads = list[weakref.ref[torch.nn.Module]]


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Made:
    """Runs a script with a model that all tests share; returns its only sample."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def make(name: str, *options: str, script: ModuleType = scripts.txt2img) -> Path:
        size = [] if script is scripts.img2img else ["--W", "64", "--H", "64"]
        with monkeypatch.context() as patch:
            patch.setattr(ModelCache, "get", SHARED_MODELS.get)
            patch.setattr(ldm.pipeline, "load_model", LOAD_MODEL)
            assert script.main([*FAST, *size, "--outdir", f"out-{name}", *options]) == 0
        [sample] = Path(f"out-{name}/samples").iterdir()
        return sample.rename(f"{name}.png")

    return make


@pytest.fixture(autouse=True)
def _shared_models() -> None:
    """Runs of these tests load their models as they do outside of tests."""


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Loads:
    """Records every model that is loaded from now on, and checks that there is only one at a time."""
    models: Loads = []
    load_model = ldm.pipeline.load_model

    def counted(*args, **options):
        assert not any(model() for model in models)
        loaded = load_model(*args, **options)
        models.append(weakref.ref(loaded))
        return loaded

    monkeypatch.setattr(ldm.pipeline, "load_model", counted)
    return models


def verified(*files: Path, options: tuple[str, ...] = ()) -> bool:
    """Returns whether all files are recreated bit for bit."""
    return scripts.replay.main([*map(str, files), "--verify", "--quiet", *options]) == 0


@pytest.mark.long
def test_files_of_one_model_share_it(made: Made, loads: Loads) -> None:
    copy = Path("models/ldm/copy/model.ckpt")
    copy.parent.mkdir(parents=True)
    shutil.copy(ROOT / BUNDLED_CKPT, copy)
    ours = [made(name, "--prompt", name) for name in ("a", "b", "c")]
    loads.clear()
    other = made("d", "--ckpt", str(copy), "--config", BUNDLED_CONFIG)
    full = made("e", "--precision", "full", "--ema", "off")
    for files, expected in ((ours, 1), ([ours[0], other, full, full, ours[0]], 4)):
        loads.clear()
        assert verified(*files)
        assert len(loads) == expected


@pytest.mark.long
def test_a_file_of_weights_that_changes_is_read_again(made: Made, loads: Loads) -> None:
    changing, kept = Path("changing.ckpt"), ModelCache()
    content = torch.load(ROOT / BUNDLED_CKPT, weights_only=True)
    torch.save(content, changing)

    def again(name: str) -> bytes:
        typed = ["--ckpt", str(changing), "--config", BUNDLED_CONFIG, "--outdir", name]
        assert run(scripts.txt2img.parser().parse_args([*FAST, *typed, "--W", "64", "--H", "64"]), kept) == 0
        return Path(name, "samples/00000.png").read_bytes()

    assert again("first") == again("second") and len(loads) == 1
    weights = content["state_dict"]
    key = "model.diffusion_model.out.2.weight"
    torch.save({"state_dict": {**weights, key: 2 * weights[key]}}, changing)
    assert again("third") != again("first") and len(loads) == 2


def a_lora(path: Path) -> Path:
    """A file that changes a layer of the bundled model's U-Net and one of its text encoder."""
    random = torch.Generator().manual_seed(0)
    shapes = {
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_v": (128, 192),
        "lora_te_text_model_encoder_layers_0_mlp_fc1": (768, 192),
    }
    tensors = {}
    for name, (rows, columns) in shapes.items():
        tensors[f"{name}.lora_down.weight"] = torch.randn(4, columns, generator=random)
        tensors[f"{name}.lora_up.weight"] = torch.randn(rows, 4, generator=random)
    torch.save(tensors, path)
    return path


def a_textual_inversion(path: Path) -> Path:
    vectors = torch.randn(2, 192, generator=torch.Generator().manual_seed(0))
    torch.save({"string_to_param": {"*": vectors}}, path)
    return path


@pytest.mark.long
@pytest.mark.parametrize("options", [(), ("--lowmem", "--precision", "full")])
def test_nothing_of_a_file_stays_for_the_next(made: Made, loads: Loads, options: tuple[str, ...]) -> None:
    """Not a LoRA, a textual inversion or an image to start from: each file's bytes are those of a separate run."""
    Path("loras").mkdir()
    Path("words").mkdir()
    lora, word = a_lora(Path("loras/ink.pt")), a_textual_inversion(Path("words/foil.pt"))
    Image.fromarray(image_at(3, "fresh")[:64, :64]).save("scene.png")
    one = ["--prompt", "a red foil", *options]
    plain = made("plain", *one)
    inked, taught = made("inked", *one, "--lora", str(lora)), made("taught", *one, "--embedding", str(word))
    begun = made("begun", *one, "--init-img", "scene.png", script=scripts.img2img)
    assert len({path.read_bytes() for path in (plain, inked, taught, begun)}) == 4
    loads.clear()
    folders = ("--lora_dir", "loras", "--embedding_dir", "words")
    switches = options[:1]  # a switch is not recorded
    assert verified(inked, plain, taught, plain, begun, plain, options=(*folders, *switches))
    assert len(loads) == 1
    remade = [Path("outputs/replay", f"plain{number}.png") for number in ("", "-1", "-2")]
    assert {path.read_bytes() for path in remade} == {plain.read_bytes()}


@pytest.mark.long
def test_a_fault_leaves_nothing_behind(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    plain = made("plain", "--prompt", "a red cube")
    inked = made("inked", "--prompt", "a red cube", "--lora", str(a_lora(Path("ink.pt"))))
    assert verified(plain, inked, plain, options=("--lora_dir", "."))
    torch.save({"lora_te2_x.lora_down.weight": torch.zeros(1)}, "ink.pt")
    capsys.readouterr()
    assert not verified(plain, inked, plain, options=("--lora_dir", "."))
    read = capsys.readouterr()
    assert read.out.count("plain.png: identical") == 2 and "inked.png: " in read.err
