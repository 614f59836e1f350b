"""T2I-Adapter against diffusers' network: its maps, and what the U-Net makes of them."""

import pytest
import torch
from safetensors.torch import save_file

from ldm.checkpoints.adapters.control import network_of, read_control
from ldm.checkpoints.formats.detect import CheckpointError
from ldm.models.diffusion.control import Control, FeatureUnit
from ldm.modules.diffusionmodules.adapter import T2IAdapter
from tests.support.control import given
from tests.support.golden_data import relative_error, tiny_model, weight_of

WIDTHS = [32, 64, 128, 128]
THEIRS = {"full": ("full_adapter", 2), "light": ("light_adapter", 4)}


def authors(kind, channels=3):
    """An adapter with weights that belong to its keys."""
    network = T2IAdapter(channels, WIDTHS, THEIRS[kind][1], kind == "light")
    network.load_state_dict({key: weight_of(key, value.shape) for key, value in network.state_dict().items()})
    return network.eval().requires_grad_(False)


def their_name(kind, name):
    """The name in diffusers' layout, written out from its module tree."""
    parts = name.split(".")
    if parts[0] == "body" and kind == "full":
        level, block = divmod(int(parts[1]), 2)
        inner = ["in_conv"] if parts[2] == "in_conv" else ["resnets", str(block), parts[2]]
        return ".".join(["adapter", "body", str(level), *inner, *parts[3:]])
    if parts[0] == "body" and parts[2] == "body":
        return ".".join(["adapter", "body", parts[1], "resnets", *parts[3:]])
    return f"adapter.{name}"


@pytest.fixture(scope="module")
def unet():
    return tiny_model().model.diffusion_model


@pytest.mark.parametrize("kind", THEIRS)
@torch.inference_mode()
def test_diffusers_maps(kind, unet, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    adapter_type, blocks = THEIRS[kind]
    given_widths = WIDTHS if kind == "full" else WIDTHS[:3]  # whose light one adds a last level by itself
    theirs = diffusers.T2IAdapter(
        in_channels=3,
        channels=given_widths,
        num_res_blocks=blocks,
        downscale_factor=8,
        adapter_type=adapter_type,
    )
    ours = authors(kind)
    weights = {their_name(kind, name): tensor for name, tensor in ours.state_dict().items()}
    theirs.load_state_dict(weights)
    (hint,) = given("hint")
    expected = theirs.eval()(hint)
    for a, b in zip(ours(hint), expected, strict=True):
        assert relative_error(a, b) <= 1e-5
    for form, tensors in (("theirs", weights), ("authors", ours.state_dict())):
        save_file(tensors, tmp_path / f"{form}.safetensors")
        read = network_of(read_control(tmp_path / f"{form}.safetensors"), unet)
        assert all(torch.equal(a, b) for a, b in zip(read(hint), ours(hint), strict=True))


@torch.inference_mode()
def test_what_the_unet_makes_of_them(unet):
    """The maps are added after the last block of each level, by hooks here: the authors' places."""
    x, hint, t, context = given("x", "hint", "t", "context")
    maps = [0.3 * one for one in authors("full")(hint)]
    units = [FeatureUnit(dict(zip((2, 5, 8, 11), (0.5 * one for one in maps), strict=True)))] * 2
    features = Control(tuple(units)).features()
    found = unet(x, t, context, features=features)
    handles = [
        unet.input_blocks[i].register_forward_hook(lambda module, args, out, added=added: out + added)
        for i, added in zip((2, 5, 8, 11), maps, strict=True)
    ]
    expected = unet(x, t, context)
    for handle in handles:
        handle.remove()
    assert relative_error(found, expected) <= 1e-6
    assert relative_error(found, unet(x, t, context)) > 0.01


def test_an_adapter_of_other_sizes(unet, tmp_path):
    network = T2IAdapter(3, [320, 640, 1280, 1280])
    save_file(network.state_dict(), tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"a\.safetensors: .* has shape .* of another model$"):
        network_of(read_control(tmp_path / "a.safetensors"), unet)
