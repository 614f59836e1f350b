"""The U-Net as extensions see it, and the sizes that it takes."""

import pytest
import torch

from ldm.modules.diffusionmodules.openaimodel import AttentionBlock, UNetModel
from ldm.modules.diffusionmodules.util import timestep_embedding
from tests.support.golden_data import figure, relative_error


class Walker(UNetModel):
    """A subclass whose forward walks the blocks, the way extensions of the original do."""

    def forward(self, x, timesteps, context=None):
        skips = []
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels))
        h = x
        for module in self.input_blocks:
            h = module(h, emb, context)
            skips.append(h)
        h = self.middle_block(h, emb, context)
        for module in self.output_blocks:
            h = module(torch.cat([h, skips.pop()], dim=1), emb, context)
        return self.out(h)


def test_a_subclass_can_walk_the_blocks(tiny):
    unet = tiny.model.diffusion_model
    walker = Walker.__new__(Walker)
    walker.__dict__ = unet.__dict__
    eps = walker(figure("unet/x"), figure("unet/t"), figure("unet/context"))
    assert relative_error(eps, figure("unet/eps")) < 2e-5


@pytest.mark.parametrize("size", [(2, 3), (7, 9), (13, 20), (8, 12)])
def test_every_latent_size_works(tiny, size):
    x = torch.randn(1, 4, *size, generator=torch.Generator().manual_seed(0))
    context = figure("unet/context")[:1]
    eps = tiny.apply_model(x, torch.tensor([500]), context)
    assert eps.shape == x.shape
    assert torch.isfinite(eps).all()


def test_wrapping_a_call_by_keyword_and_with_fractional_time(tiny):
    x, context = figure("unet/x"), figure("unet/context")
    low, mid, high = (tiny.apply_model(x, torch.full((2,), t), cond=context) for t in (500.0, 500.5, 501.0))
    assert not torch.equal(low, high)
    # a timestep rounded to a whole one would give `low` or `high` itself
    assert relative_error(mid, (low + high) / 2) < 0.5 * min(
        relative_error(low, mid), relative_error(high, mid)
    )


@pytest.mark.parametrize("form", [lambda c: c, lambda c: [c], lambda c: {"c_crossattn": [c]}])
def test_conditioning_as_tensor_list_or_dict(tiny, form):
    x, t, context = figure("unet/x"), figure("unet/t"), figure("unet/context")
    assert relative_error(tiny.apply_model(x, t, form(context)), figure("unet/eps")) < 2e-5


def test_timestep_embedding_closed_form():
    got = timestep_embedding(torch.tensor([0.0, 3.5]), 7)
    frequencies = torch.tensor([10000 ** (-k / 3) for k in range(3)], dtype=torch.float64)
    angles = torch.tensor([0.0, 3.5], dtype=torch.float64)[:, None] * frequencies
    expected = torch.cat([angles.cos(), angles.sin(), torch.zeros(2, 1)], dim=1)
    assert relative_error(got, expected) < 1e-6


@pytest.mark.parametrize("new_order", [False, True])
def test_attention_without_text(new_order):
    """Against diffusers' block of the same kind."""
    attention = pytest.importorskip("diffusers.models.attention_processor")
    torch.manual_seed(0)
    block = AttentionBlock(64, num_head_channels=16, use_new_attention_order=new_order)
    x = torch.randn(2, 64, 5, 3)
    assert torch.equal(block(x), x)  # what comes out is scaled by zero before it is trained
    torch.nn.init.normal_(block.proj_out.weight, std=0.2)
    theirs = attention.Attention(
        64, heads=4, dim_head=16, bias=True, norm_num_groups=32, residual_connection=True
    )
    layout = (3, 4, 16, -1) if new_order else (4, 3, 16, -1)
    for name, ours in block.qkv.named_parameters():
        parts = ours.reshape(layout).unbind(0 if new_order else 1)
        for kind, part in zip("qkv", parts, strict=True):
            parameter = theirs.get_parameter(f"to_{kind}.{name}")
            parameter.data = part.reshape(parameter.shape)
    theirs.group_norm.load_state_dict(block.norm.state_dict())
    theirs.to_out[0].load_state_dict({"weight": block.proj_out.weight[:, :, 0], "bias": block.proj_out.bias})
    assert relative_error(block(x).detach(), theirs(x).detach()) < 1e-6
