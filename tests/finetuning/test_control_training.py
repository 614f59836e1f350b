"""ControlNet's training against diffusers: loss and gradients; its hints, its file, and its beginning."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.checkpoints.adapters.control import control_network, read_control
from ldm.checkpoints.configs import BUNDLED_CONFIG, BUNDLED_CONTROL
from ldm.checkpoints.formats.read import read_checkpoint
from ldm.checkpoints.layouts.names import to_diffusers
from ldm.checkpoints.layouts.settings import component_configs
from ldm.checkpoints.load import build_model
from ldm.config import read_config
from ldm.finetuning.batches import Batch
from ldm.finetuning.control import ControlPart, ControlTuning, control_of
from ldm.finetuning.data import Example, read_examples, with_hints
from ldm.finetuning.latents import Placed, Placer
from ldm.finetuning.settings import make_settings
from ldm.util import InputError
from scripts.train import main
from tests.support.control import control_weights
from tests.support.golden_data import inpainting_config, relative_error, tiny_model
from tests.support.paths import ROOT


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def image(path, seed, size=(64, 64)):
    Image.fromarray(np.random.default_rng(seed).integers(256, size=(*size[::-1], 3), dtype=np.uint8)).save(
        path
    )
    return path


@pytest.fixture
def tuning(model, tmp_path):
    """Two images with hints, the second mirrored, and the module that trains on them."""
    settings = make_settings("controlnet", {"hint": "grey"})
    module = ControlTuning(model, ControlPart(model, 1e-3), settings)
    module.log = lambda *args, **kwargs: None
    module.placer = Placer([(64, 64)])
    placed = []
    for i in range(2):
        path = image(tmp_path / f"{i}.png", i)
        placement = module.placer.read(Example(path, ""))[1]
        placed.append(Placed(Example(path, "", hint=image(tmp_path / f"hint{i}.png", 10 + i)), placement, ()))
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 2, 4, 8, 8, generator=generator)
    times = torch.tensor([100, 700])
    return module, Batch(latents, ["a cube", "a ball"], times, noise, torch.ones(2), placed, [0, 1])


@pytest.mark.long
def test_loss_and_gradients_are_those_of_diffusers(tuning, model):
    """The step of its script train_controlnet.py, on the same batch, noise and hints."""
    diffusers = pytest.importorskip("diffusers")
    from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint

    module, batch = tuning
    network = module.part.network
    network.load_state_dict(
        control_weights(network)
    )  # its convolutions of zeros are none, so all layers learn

    configs = component_configs(model)["unet"]
    unet = diffusers.UNet2DConditionModel(**configs).requires_grad_(False)
    unet.load_state_dict(to_diffusers(model.state_dict())["unet"])
    theirs = diffusers.ControlNetModel.from_unet(unet)
    named = {f"control_model.{name}": value for name, value in network.named_parameters()}
    theirs.load_state_dict(convert_controlnet_checkpoint(named, {**theirs.config}))

    first, second = (np.asarray(Image.open(p.example.hint).convert("L")) for p in batch.images)
    hint = torch.from_numpy(np.stack([first, second[:, ::-1]])).float()[:, None].expand(-1, 3, -1, -1) / 255
    x = model.q_sample(model.scale_factor * batch.latents, batch.t, batch.noise)
    context = model.get_learned_conditioning(batch.captions)
    down, middle = theirs(x, batch.t, context, hint, return_dict=False)
    added = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
    loss = torch.nn.functional.mse_loss(unet(x, batch.t, context, **added).sample, batch.noise)
    loss.backward()

    own = module.training_step(batch)
    own.backward()
    assert relative_error(own.detach(), loss.detach()) < 1e-5
    grads = {f"control_model.{name}": value.grad for name, value in network.named_parameters()}
    converted = convert_controlnet_checkpoint(grads, {**theirs.config})
    same = [(converted[name], value.grad) for name, value in theirs.named_parameters()]
    assert len(same) == len(grads)
    mine, other = (torch.cat([part.flatten() for part in side]) for side in zip(*same, strict=True))
    assert relative_error(mine, other) < 1e-5
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_new_one_is_the_encoder_and_changes_no_bit(tuning, model):
    module, batch = tuning
    unet, x = model.model.diffusion_model, batch.latents
    state, weights = module.part.network.state_dict(), unet.state_dict()
    shared = state.keys() & weights.keys()
    assert all(torch.equal(state[name], weights[name]) for name in shared)
    assert {name.split(".")[0] for name in state.keys() - shared} == {
        "input_hint_block", "zero_convs", "middle_block_out"
    }  # fmt: skip
    with torch.inference_mode():
        cond = module.conditioning(batch)
        assert torch.equal(
            model.apply_model(x, batch.t, cond), model.apply_model(x, batch.t, cond["c_crossattn"])
        )


def test_one_of_an_inpainting_model_sees_the_latents_alone():
    unet = tiny_model(inpainting_config()).model.diffusion_model
    first = control_of(unet, 4).state_dict()["input_blocks.0.0.weight"]
    assert torch.equal(first, unet.input_blocks[0][0].weight[:, :4])


def test_a_step_moves_the_network_alone_and_the_loss_falls(tuning, model):
    module, batch = tuning
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer, losses = torch.optim.AdamW(module.part.groups()), []
    for _ in range(4):
        loss = module.training_step(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.99 * losses[0]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_hints_are_cut_as_their_images(tmp_path):
    """A hint of twice the size, so of the same aspect; mirrored with its image."""
    module = ControlTuning.__new__(ControlTuning)
    torch.nn.Module.__init__(module)
    module.settings, module.placer = make_settings("controlnet", {"hint": "none"}), Placer([(64, 64)])
    path, hint, small = (
        tmp_path / "a.png",
        tmp_path / "b.png",
        Image.open(image(tmp_path / "c.png", 0, (6, 4))),
    )
    for file, size in ((path, (96, 64)), (hint, (192, 128))):
        small.resize(size, Image.Resampling.BICUBIC).save(file)
    source, placement = module.placer.read(Example(path, "", hint=hint))
    expected = module.placer.pixels(source, placement, False)[0] / 2 + 0.5
    upright, mirrored = (module._hint(Placed(Example(path, "", hint=hint), placement, ()), m) for m in (0, 1))
    assert torch.equal(upright.flip(2), mirrored)
    assert (upright - expected).abs().mean() < 0.03 < (mirrored - expected).abs().mean()
    wide = image(tmp_path / "d.png", 2, (64, 64))
    with pytest.raises(
        InputError, match=r"the hint .*d.png is 64x64, and the image 96x64, of another aspect"
    ):
        module.placer.read(Example(path, "", hint=wide))


def test_where_hints_are_named(tmp_path):
    usual = Example(tmp_path, "")
    for folder in ("own", "seen", "list"):
        (tmp_path / folder).mkdir()
        image(tmp_path / folder / "a.png", 0)
    (tmp_path / "own/a.txt").write_text("a cube")
    (tmp_path / "seen/a.png").rename(tmp_path / "seen/a.webp")
    (found,) = with_hints(read_examples(tmp_path / "own", usual), tmp_path / "seen")
    assert found.hint == tmp_path / "seen/a.webp"
    image(tmp_path / "own/b.png", 1)
    with pytest.raises(InputError, match=r"1 of 2 images have no hint in .*seen, such as b.png"):
        with_hints(read_examples(tmp_path / "own", Example(tmp_path, "x")), tmp_path / "seen")
    rows = {
        "metadata.jsonl": {"file_name": "a.png", "text": "x", "conditioning_image": "../own/a.png"},
        "prompt.json": {
            "target": "a.png",
            "source": "../own/a.png",
            "prompt": "x",
        },  # of ControlNet's authors
    }
    for name, row in rows.items():
        list_file = tmp_path / "list" / name
        list_file.write_text(json.dumps(row) + "\n")
        (found,) = read_examples(tmp_path / "list", usual)
        assert (found.path.name, found.caption, found.hint) == ("a.png", "x", tmp_path / "list/../own/a.png")
        list_file.unlink()
    table = '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "list"\nclass_tokens = "x"\n'
    (tmp_path / "set.toml").write_text(table + 'conditioning_data_dir = "seen"\n')
    pytest.importorskip("tomllib")
    (found,) = read_examples(tmp_path / "set.toml", usual)
    assert found.hint == tmp_path / "seen/a.webp"


QUICK = ["--resolution", "64", "--precision", "full", "--no-checkpointing", "--quiet", "--steps", "1"]


@pytest.mark.long
def test_the_file_is_read_back(tmp_path, monkeypatch, capsys):
    pytest.importorskip("cv2")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    image("a.png", 0)
    (tmp_path / "a.txt").write_text("a red cube")
    typed = ["controlnet", "--data", ".", *QUICK]
    assert main([*typed, "--out", "x.safetensors"]) == 2
    assert "1 of 1 images have no hint, such as a.png: give a folder" in capsys.readouterr().err
    options = [
        "--hint",
        "canny",
        "--ema_decay",
        "0.5",
        "--sample_steps",
        "1",
        "--sample_prompt",
        "a red cube",
    ]
    assert main([*typed, "--out", "x.safetensors", *options]) == 0
    assert Image.open("x.training/samples/step-000001.png").size == (64, 64)
    checkpoint = read_checkpoint("x.safetensors")
    assert checkpoint.kind.part == "ControlNet"
    assert checkpoint.metadata["modelspec.architecture"] == "stable-diffusion-v1/controlnet"
    assert {value.dtype for value in checkpoint.state_dict.values()} == {torch.float16}
    assert all(key.startswith("control_model.") for key in checkpoint.state_dict)
    assert (tmp_path / "x.safetensors").stat().st_size < 8 * 2**20
    rates = ["--learning_rate", "0", "--weight_decay", "0", "--dtype", "fp32"]
    assert (
        main([*typed, "--hint", "canny", "--out", "y.safetensors", "--start", "x.safetensors", *rates]) == 0
    )
    again = read_checkpoint("y.safetensors").state_dict
    assert all(torch.equal(again[key], value.float()) for key, value in checkpoint.state_dict.items())


def test_the_bundled_one_is_for_the_bundled_model():
    """It acts on every map, within its limit of size, and an edge that moves changes what it adds."""
    path = ROOT / BUNDLED_CONTROL
    assert path.stat().st_size <= 8 * 2**20
    unet = build_model(read_config(ROOT / BUNDLED_CONFIG)).model.diffusion_model
    network = control_network(read_control(path), unet, torch.float32)
    edges = torch.zeros(2, 3, 128, 128)
    edges[0, :, 40:80, 30], edges[1, :, 40:80, 90] = 1, 1
    x, t, context = torch.zeros(2, 4, 16, 16), torch.tensor([500, 500]), torch.zeros(2, 8, 192)
    with torch.inference_mode():
        maps = network(x, edges, t, context)
    assert all(one.any() and not torch.equal(one[0], one[1]) for one in maps)
