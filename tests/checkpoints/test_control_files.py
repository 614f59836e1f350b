"""ControlNet files of every layout: the same network from each; others are named."""

import json

import pytest
import torch
from safetensors.torch import save_file

import scripts.inspect_model as inspect_model
from ldm.checkpoints.adapters.control import control_file, control_network, read_control
from ldm.checkpoints.convert_control import convert_control
from ldm.checkpoints.formats.detect import CheckpointError
from ldm.checkpoints.inspect import inspect_path
from ldm.modules.diffusionmodules.adapter import T2IAdapter
from ldm.util import InputError
from tests.support.control import FIGURES, control_weights, given
from tests.support.golden_data import TOLERANCE, figure, relative_error, tiny_config, tiny_model

ATTENTION = "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"


@pytest.fixture(scope="module")
def weights():
    return control_weights()


@pytest.fixture(scope="module")
def unet():
    return tiny_model().model.diffusion_model


def prefixed(weights):
    return {f"control_model.{key}": tensor for key, tensor in weights.items()}


def figures_of(network):
    """The largest error of the maps against those of the authors' code."""
    x, hint, t, context = given("x", "hint", "t", "context")
    with torch.inference_mode():
        added = network.float()(x, hint, t, context)
    expected = [figure(f"residual_{i:02}", FIGURES) for i in range(13)]
    return max(relative_error(ours, theirs) for ours, theirs in zip(added, expected, strict=True))


def saved(form, weights, folder):
    """The weights as a file, or a folder, in one of the forms in which they are published."""
    path = folder / f"{form}.pth"
    if form == "authors":
        torch.save({"state_dict": prefixed(weights)}, path)
    elif form == "with a model":
        torch.save(prefixed(weights) | tiny_model().state_dict(), path)
    elif form == "bare":
        save_file(weights, path)
    elif form == "fp16":
        save_file({key: tensor.half() for key, tensor in prefixed(weights).items()}, path)
    elif form == "difference":
        own = tiny_model().model.diffusion_model.state_dict()
        parts = {key: tensor - own[key] if key in own else tensor for key, tensor in weights.items()}
        save_file({**prefixed(parts), "difference": torch.zeros(())}, path)
    else:
        diffusers = pytest.importorskip("diffusers")
        from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint

        theirs = diffusers.ControlNetModel(
            block_out_channels=(32, 64, 128, 128), cross_attention_dim=64, attention_head_dim=8
        )
        theirs.load_state_dict(convert_controlnet_checkpoint(prefixed(weights), {**theirs.config}))
        theirs.save_pretrained(folder / "theirs")
        return (
            folder / "theirs" if form == "folder" else folder / "theirs/diffusion_pytorch_model.safetensors"
        )
    return path


@pytest.mark.parametrize(
    ("form", "allowed"),
    [
        ("authors", TOLERANCE), ("with a model", TOLERANCE), ("bare", TOLERANCE), ("difference", TOLERANCE),
        ("folder", TOLERANCE), ("file of diffusers", TOLERANCE), ("fp16", 2.4e-3),
    ],
)  # fmt: skip
def test_every_form_is_the_same_network(form, allowed, weights, unet, tmp_path):
    network = control_network(read_control(saved(form, weights, tmp_path)), unet)
    assert figures_of(network) <= allowed


def test_settings_that_weights_do_not_show(weights, tmp_path):
    path = saved("folder", weights, tmp_path)
    plain = read_control(path)
    assert not plain.pools and not plain.reversed_channels
    config = json.loads((path / "config.json").read_text())
    config |= {"global_pool_conditions": True, "controlnet_conditioning_channel_order": "bgr"}
    (path / "config.json").write_text(json.dumps(config))
    other = read_control(path)
    assert other.pools and other.reversed_channels
    save_file(weights, tmp_path / "control_v11e_sd15_shuffle.safetensors")
    assert read_control(tmp_path / "control_v11e_sd15_shuffle.safetensors").pools


@pytest.mark.parametrize(
    ("key", "shape", "said"),
    [
        (ATTENTION, (320, 1024), "is a ControlNet for Stable Diffusion v2, and this"),
        (ATTENTION, (640, 2048), "is a ControlNet for SDXL, and this"),
        ("lora_controlnet", (), "is a Control-LoRA, which is not supported; give a whole ControlNet"),
        ("middle_block.0.in_layers.0.weight", (3,), "is a ControlNet without input_blocks.0.0.weight; the file is"),
    ],
)  # fmt: skip
def test_other_models_are_named(key, shape, said, tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({key: torch.zeros(shape), "zero_convs.0.0.weight": torch.zeros(3, 3, 1, 1)}, path)
    with pytest.raises(CheckpointError, match=r"other\.safetensors: ") as caught:
        read_control(path)
    assert said in str(caught.value)


def test_a_model_and_a_missing_file(tmp_path):
    torch.save({"state_dict": tiny_model().state_dict()}, tmp_path / "model.ckpt")
    with pytest.raises(
        CheckpointError, match="give a ControlNet, a T2I-Adapter or an IP-Adapter with --control"
    ):
        read_control(tmp_path / "model.ckpt")
    with pytest.raises(InputError, match=r"the ControlNet .*none\.pth does not exist; give a file"):
        control_file(tmp_path / "none.pth")


def test_a_network_of_other_sizes(weights, tmp_path):
    save_file(weights, tmp_path / "c.safetensors")
    config = tiny_config()
    config["params"]["unet_config"]["params"]["model_channels"] = 64
    from ldm.checkpoints.load import build_model

    wider = build_model(config).model.diffusion_model
    with pytest.raises(
        CheckpointError, match=r"is a ControlNet of 32 channels, and the model has 64; give one"
    ):
        control_network(read_control(tmp_path / "c.safetensors"), wider)


@pytest.mark.parametrize("to", ["compvis", "ckpt", "diffusers"])
def test_conversions_come_back(to, weights, unet, tmp_path):
    """Through every layout and back: the same tensors; diffusers itself reads its folder."""
    save_file(weights, tmp_path / "c.safetensors")
    out = tmp_path / {"compvis": "out.safetensors", "ckpt": "out.ckpt", "diffusers": "out"}[to]
    convert_control(read_control(tmp_path / "c.safetensors"), unet, out, to)
    back = read_control(out)
    assert back.weights.keys() == weights.keys()
    assert all(torch.equal(back.weights[key], tensor) for key, tensor in weights.items())
    if to == "diffusers":
        theirs = pytest.importorskip("diffusers").ControlNetModel.from_pretrained(out)
        x, hint, t, context = given("x", "hint", "t", "context")
        with torch.inference_mode():
            down, middle = theirs.eval()(x, t, context, hint, return_dict=False)
        for i, part in enumerate([*down, middle]):
            assert relative_error(part, figure(f"residual_{i:02}", FIGURES)) <= 1e-5


def test_inspection(weights, tmp_path):
    save_file(weights, tmp_path / "c.safetensors")
    (found,) = inspect_path(tmp_path / "c.safetensors", False, lambda kind: tiny_config())
    assert found.kind.name == "a ControlNet" and found.fits and set(found.parameters) == {"ControlNet"}
    save_file({**weights, "zero_convs.0.0.weight": torch.zeros(3, 3, 1, 1)}, tmp_path / "d.safetensors")
    (found,) = inspect_path(tmp_path / "d.safetensors", False, lambda kind: tiny_config())
    assert found.fits is False and "zero_convs.0.0.weight has shape" in found.problem


@pytest.mark.parametrize(("channels", "said"), [(3, "yes"), (12, "no: ")])
def test_an_inspection_tells_whether_a_t2i_adapter_loads(tmp_path, capsys, channels, said):
    """The light one of v1; one for SDXL reads cells of 16x16 pixels."""
    network = T2IAdapter(channels, [320, 640, 1280, 1280], 4, light=True)
    save_file({key: torch.zeros(tensor.shape, dtype=torch.float16) for key, tensor in network.state_dict().items()},
              tmp_path / "adapter.safetensors")  # fmt: skip
    assert inspect_model.main([str(tmp_path / "adapter.safetensors"), "--no_hash"]) == (channels != 3)
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[1:])
    assert rows["kind"] == "a T2I-Adapter" and rows["loads"].startswith(said)
    assert channels == 3 or rows["loads"].endswith(
        "is a T2I-Adapter for SDXL, and this toolkit runs Stable Diffusion v1"
    )
