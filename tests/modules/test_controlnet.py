"""ControlNet against the figures of its authors' code, and against diffusers'."""

import pytest
import torch

from ldm.checkpoints.formats.tensor_bytes import forget
from ldm.modules.diffusionmodules.controlnet import ControlNet
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.diffusionmodules.util import timestep_embedding
from ldm.runtime.fast import accelerate
from ldm.runtime.packing import Packer
from ldm.runtime.prepare import prepare_control
from tests.support.control import FIGURES, PARAMETERS, control_network, given
from tests.support.golden_data import (
    TOLERANCE,
    figure,
    keys,
    relative_error,
    tiny_model,
)
from tests.support.precision import EACH_PACKED, needs_int8_kernels

V1 = {**PARAMETERS, "model_channels": 320, "context_dim": 768}


@pytest.mark.parametrize(
    ("name", "parameters"), [("keys_control.json", V1), ("tiny_control_keys.json", PARAMETERS)]
)
def test_keys_are_the_published_ones(name, parameters):
    with torch.device("meta"):
        network = ControlNet(hint_channels=3, **parameters)
    found = {key: list(value.shape) for key, value in network.state_dict().items()}
    assert found == {key.removeprefix("control_model."): shape for key, shape in keys(name).items()}


@pytest.fixture(scope="module", params=[None, *EACH_PACKED], ids=["plain", "float32", "bf16"])
def networks(request):
    """A U-Net and its control network, as they are or on the fast path."""
    control, unet = control_network(), tiny_model().model.diffusion_model
    if request.param is not None:
        for network in (control, unet):
            accelerate(network, Packer(request.param, lambda weight: None))
    return control, unet, 2.7e-2 if request.param is torch.bfloat16 else TOLERANCE


@torch.inference_mode()
def test_what_the_authors_code_computes(networks):
    control, unet, allowed = networks
    x, hint, t, context = given("x", "hint", "t", "context")
    added = control(x, hint, t, context)
    assert len(added) == 13
    for i, residual in enumerate(added):
        assert relative_error(residual.float(), figure(f"residual_{i:02}", FIGURES)) <= allowed, i
    assert relative_error(unet(x, t, context).float(), figure("eps_without", FIGURES)) <= allowed
    assert relative_error(unet(x, t, context, control=added).float(), figure("eps", FIGURES)) <= allowed
    weaker = [0.4 * residual for residual in added]
    assert (
        relative_error(unet(x, t, context, control=weaker).float(), figure("eps_scale0.4", FIGURES))
        <= allowed
    )


@needs_int8_kernels
@torch.inference_mode()
def test_eight_bits_stay_near():
    control = control_network()
    prepare_control(
        control, Packer(torch.float32, forget), torch.device("cpu"), torch.float32, forget, int8=True
    )
    added = control(*given("x", "hint", "t", "context"))
    errors = [relative_error(own, figure(f"residual_{i:02}", FIGURES)) for i, own in enumerate(added)]
    assert (
        1e-3 < max(errors) < 8e-2
    )  # the first map has the first convolution and the hint alone, which stay float32
    assert errors[0] <= TOLERANCE


@torch.inference_mode()
def test_zero_convolutions_change_nothing(networks):
    control, unet, _ = networks
    x, hint, t, context = given("x", "hint", "t", "context")
    zeros = [torch.zeros_like(residual) for residual in control(x, hint, t, context)]
    assert torch.equal(unet(x, t, context, control=zeros), unet(x, t, context))


def test_a_new_network_adds_zeros():
    network = ControlNet(hint_channels=3, **PARAMETERS).eval()
    x, hint, t, context = given("x", "hint", "t", "context")
    with torch.inference_mode():
        assert not any(residual.any() for residual in network(x, hint, t, context))


@torch.inference_mode()
def test_equal_halves_change_nothing(networks):
    """Both halves of a guided batch as one call, and each alone; one hint for all."""
    control, unet, allowed = networks
    x, hint, t, context = given("x", "hint", "t", "context")
    x, hint, t = torch.cat([x[:1], x[:1]]), hint[:1], torch.full((2,), 321)
    both = unet(x, t, context, control=control(x, hint, t, context))
    for i in range(2):
        one = [value[i : i + 1] for value in (x, t, context)]
        alone = unet(*one, control=control(one[0], hint, *one[1:]))
        assert relative_error(both[i : i + 1].float(), alone.float()) <= allowed


@torch.inference_mode()
def test_diffusers_computes_the_same():
    """diffusers' own converter from the authors' names, and its own network."""
    diffusers = pytest.importorskip("diffusers")
    from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint

    network = control_network()
    config = {
        "block_out_channels": (32, 64, 128, 128), "cross_attention_dim": 64, "attention_head_dim": 8,
        "conditioning_embedding_out_channels": (16, 32, 96, 256), "layers_per_block": 2,
    }  # fmt: skip
    theirs = diffusers.ControlNetModel(**config)
    state = {f"control_model.{key}": value for key, value in network.state_dict().items()}
    theirs.load_state_dict(convert_controlnet_checkpoint(state, {**theirs.config}))
    x, hint, t, context = given("x", "hint", "t", "context")
    down, middle = theirs.eval()(x, t, context, hint, return_dict=False)
    for ours, other in zip(network(x, hint, t, context), [*down, middle], strict=True):
        assert relative_error(ours, other) <= 1e-5


class Controlled(UNetModel):
    """The extension's U-Net: it walks the blocks itself."""

    def forward(self, x, timesteps=None, context=None, control=None, only_mid_control=False):
        added = list(control)
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels, repeat_only=False))
        h, skips = x.type(self.dtype), []
        for module in self.input_blocks:
            h = module(h, emb, context)
            skips.append(h)
        h = self.middle_block(h, emb, context) + added.pop()
        for module in self.output_blocks:
            extra = 0 if only_mid_control else added.pop()
            h = module(torch.cat([h, skips.pop() + extra], dim=1), emb, context)
        return self.out(h.type(x.dtype))


@torch.inference_mode()
def test_the_authors_extension_runs_as_it_is():
    """A subclass of the U-Net with another `forward`, and a control network under their keywords."""
    unet = tiny_model().model.diffusion_model
    unet.__class__ = Controlled
    x, hint, t, context = given("x", "hint", "t", "context")
    control = control_network()(x=x, hint=hint, timesteps=t, context=context)
    assert (
        relative_error(unet(x=x, timesteps=t, context=context, control=control), figure("eps", FIGURES))
        <= TOLERANCE
    )
    alone = [*[torch.zeros_like(part) for part in control[:-1]], control[-1]]
    expected = tiny_model().model.diffusion_model(x, t, context, control=alone)
    middle = unet(x=x, timesteps=t, context=context, control=control, only_mid_control=True)
    assert relative_error(middle, expected) <= TOLERANCE


def test_the_number_of_maps_is_checked():
    unet = tiny_model().model.diffusion_model
    x, t, context = given("x", "t", "context")
    with pytest.raises(ValueError, match="zip"):
        unet(x, t, context, control=[torch.zeros(1)])
