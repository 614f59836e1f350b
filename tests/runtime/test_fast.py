import pytest
import torch
from torch import nn

from ldm.modules.diffusionmodules import openaimodel
from ldm.modules.diffusionmodules.util import timestep_embedding
from ldm.runtime import kernels
from ldm.runtime.fast import FastUNet
from ldm.runtime.packing import PackedConv2d, PackedLinear, Packer
from ldm.runtime.prepare import prepare
from tests.support.golden_data import TOLERANCE, figure, figures, relative_error, sampled, tiny_model
from tests.support.precision import EACH_PACKED, needs_bf16_kernels

# the original under bf16 autocast on another CPU, against its float32; CPUs differ in how they sum
BF16_BUDGET = {
    "unet": 2.1e-2,
    "text": 5.2e-3,
    "decode": 1.8e-2,
    ("ddim", 10, 1.0): 4.8e-3,
    ("plms", 10, 1.0): 3.7e-3,
    ("ddim", 10, 7.5): 3.0e-2,
    ("plms", 10, 7.5): 2.9e-2,
    ("ddim", 50, 7.5): 1.8e-2,
    ("plms", 50, 7.5): 2.0e-2,
}
SLACK = 1.25


def prepared(dtype, forget=lambda weight: None, budget=None):
    model = tiny_model()
    return model, prepare(model, dtype, forget, budget)


@pytest.fixture(scope="module", params=EACH_PACKED, ids=["float32", "bf16"])
def fast(request):
    return request.param, prepared(request.param)[0]


def allowed(dtype, key):
    return TOLERANCE if dtype is torch.float32 else SLACK * BF16_BUDGET[key]


@pytest.mark.parametrize("case", ["unet", "unet_wide"])
@torch.inference_mode()
def test_noise(fast, case):
    dtype, model = fast
    eps = model.apply_model(*(figure(f"{case}/{name}") for name in ("x", "t", "context")))
    assert relative_error(eps.float(), figure(f"{case}/eps")) <= allowed(dtype, "unet")


@torch.inference_mode()
def test_text_and_pictures(fast):
    dtype, model = fast
    embedding = model.get_learned_conditioning(figures()["text/prompts"].tolist())
    assert relative_error(embedding.float(), figure("text/embedding")) <= allowed(dtype, "text")
    decoded = model.decode_first_stage(figure("vae/z"))
    assert relative_error(decoded.float(), figure("vae/decoded")) <= allowed(dtype, "decode")


@torch.inference_mode()
def test_pictures_are_encoded_in_float32(fast):
    error = relative_error(fast[1].encode_first_stage(figure("vae/image")).mean, figure("vae/mean"))
    assert error <= TOLERANCE


@pytest.mark.parametrize(
    ("method", "steps", "scale"),
    [
        pytest.param(
            *key, marks=pytest.mark.slow if key[1] == 50 else pytest.mark.long if key[2] == 1 else ()
        )
        for key in BF16_BUDGET
        if isinstance(key, tuple)
    ],
)
@torch.inference_mode()
def test_latents(fast, method, steps, scale):
    dtype, model = fast
    latents = sampled(model, method, steps, scale, ddim_discretize="compvis")
    assert latents.dtype is torch.float32
    expected = figure(f"sample/{method}_S{steps}_scale{scale}")
    assert relative_error(latents, expected) <= allowed(dtype, (method, steps, scale))


class Controlled(openaimodel.UNetModel):
    """Walks the blocks itself and adds to the skip connections, as ControlNet's U-Net does."""

    def forward(self, x, timesteps=None, context=None, control=None):
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels, repeat_only=False))
        h, skips = x.type(self.dtype), []
        for module in self.input_blocks:
            h = module(h, emb, context)
            skips.append(h)
        h = self.middle_block(h, emb, context)
        for module in self.output_blocks:
            skip = skips.pop()
            h = module(
                torch.cat([h, skip + 0.0 * skip if control is None else skip + control], dim=1), emb, context
            )
        return self.out(h.type(x.dtype))


@torch.inference_mode()
def test_a_subclass_may_walk_the_blocks(fast):
    dtype, model = fast
    network = model.model.diffusion_model
    walked = Controlled.__new__(Controlled)
    walked.__dict__ = network.__dict__
    inputs = [figure(f"unet/{name}") for name in ("x", "t", "context")]
    assert relative_error(walked(*inputs).float(), figure("unet/eps")) <= allowed(dtype, "unet")


def test_a_subclass_keeps_its_class():
    model = tiny_model()
    model.model.diffusion_model.__class__ = Controlled
    prepare(model, torch.float32, lambda weight: None)
    assert type(model.model.diffusion_model) is Controlled
    inputs = [figure(f"unet/{name}") for name in ("x", "t", "context")]
    with torch.inference_mode():
        assert relative_error(model.apply_model(*inputs), figure("unet/eps")) <= TOLERANCE


@pytest.mark.parametrize("rows", [2, 3, 6])
@torch.inference_mode()
def test_equal_halves_change_nothing(fast, rows, monkeypatch):
    """The part that guidance computes once gives what computing it twice does."""
    _, model = fast
    x = torch.randn(rows, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    x[rows // 2 : rows // 2 * 2] = x[: rows // 2]
    context = torch.randn(rows, 77, 64, generator=torch.Generator().manual_seed(6))
    t = torch.full((rows,), 321.0)
    shared = model.apply_model(x, t, context)
    monkeypatch.setattr(FastUNet, "_looks_at", lambda self, context, samples: False)
    assert relative_error(shared.float(), model.apply_model(x, t, context).float()) <= 2e-2


@torch.inference_mode()
def test_odd_sizes_and_different_times(fast):
    """Sizes that halve to odd ones, and samples at different timesteps, against the plain network."""
    dtype, model = fast
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(2, 4, 9, 13, generator=generator)
    context = torch.randn(2, 77, 64, generator=generator)
    t = torch.tensor([3.0, 700.5])
    expected = tiny_model().apply_model(x, t, context)
    assert relative_error(model.apply_model(x, t, context).float(), expected) <= allowed(dtype, "unet")


def test_where_nothing_is_packed_parameters_are_half(monkeypatch):
    """As on a GPU: no autocast, parameters in the precision of the run, the image encoder in float32."""
    monkeypatch.setattr("ldm.runtime.kernels.can_pack", lambda dtype: False)
    model, packer = prepared(torch.bfloat16)
    assert packer is None
    assert model.model.diffusion_model.dtype is torch.bfloat16
    with torch.inference_mode():
        eps = model.apply_model(*(figure(f"unet/{name}") for name in ("x", "t", "context")))
        assert eps.dtype is torch.float32
        assert relative_error(eps, figure("unet/eps")) <= SLACK * BF16_BUDGET["unet"]
        decoded = model.decode_first_stage(figure("vae/z")).float()
        assert relative_error(decoded, figure("vae/decoded")) <= SLACK * BF16_BUDGET["decode"]
        encoded = model.encode_first_stage(figure("vae/image")).mean
        assert relative_error(encoded, figure("vae/mean")) <= TOLERANCE


def test_bf16_needs_kernels_that_this_cpu_has(monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert not kernels.can_pack(torch.bfloat16) and not kernels.fast_bf16()
    assert kernels.can_pack(torch.float32)
    assert prepared(torch.bfloat16)[1] is None


@needs_bf16_kernels
def test_the_state_dict_stays_the_files():
    model, before = tiny_model(), tiny_model().state_dict()
    prepare(model, torch.bfloat16, lambda weight: None)
    model.apply_model(*(figure(f"unet/{name}") for name in ("x", "t", "context")))
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("change", ["replace", "in place"])
def test_a_changed_weight_is_packed_again(change):
    layer = nn.Linear(8, 8, bias=False).requires_grad_(False)
    layer.__class__, layer.packer = PackedLinear, Packer(torch.float32, lambda weight: None)
    x = torch.randn(2, 8)
    layer(x)
    if change == "replace":
        layer.weight = nn.Parameter(torch.eye(8), requires_grad=False)
    else:
        layer.weight.copy_(torch.eye(8))
    assert torch.equal(layer(x), x)


def test_keys_and_values_follow_context_and_weights():
    model, _ = prepared(torch.float32)
    attention = model.model.diffusion_model.middle_block[1].transformer_blocks[0].attn2
    plain = tiny_model().model.diffusion_model.middle_block[1].transformer_blocks[0].attn2
    x, contexts = torch.randn(2, 4, attention.to_q.in_features), [torch.randn(2, 77, 64) for _ in range(2)]
    with torch.inference_mode():
        for context in (*contexts, contexts[0]):
            assert relative_error(attention(x, context), plain(x, context)) <= TOLERANCE
        for network in (attention, plain):
            network.to_v.weight = nn.Parameter(2 * network.to_v.weight, requires_grad=False)
        assert relative_error(attention(x, contexts[0]), plain(x, contexts[0])) <= TOLERANCE


def test_a_budget_bounds_what_is_kept_and_changes_nothing():
    inputs = [figure(f"unet/{name}") for name in ("x", "t", "context")]
    told = []
    model, packer = prepared(torch.float32, told.append, budget=200_000)
    with torch.inference_mode():
        first = model.apply_model(*inputs)
        assert 0 < packer.size <= 200_000
        read = len(told)
        assert torch.equal(model.apply_model(*inputs), first)
    assert len(told) > read  # blocks that were not kept were recomputed
    assert relative_error(first, figure("unet/eps")) <= TOLERANCE
    packer.drop(model)
    assert packer.size == 0


def test_convolutions_of_other_kinds_stay():
    layers = [
        nn.Conv2d(8, 8, 3, groups=2),
        nn.Conv2d(8, 8, 3, dilation=2),
        nn.Conv2d(8, 8, 3, padding="same"),
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
    ]
    from ldm.runtime.fast import accelerate

    accelerate(nn.ModuleList(layers), Packer(torch.float32, lambda weight: None))
    assert not any(isinstance(layer, PackedConv2d) for layer in layers)
