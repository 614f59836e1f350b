"""8-bit products against float32 arithmetic, and the model that uses them against the golden figures."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ldm.checkpoints.configs import BUNDLED_CKPT, BUNDLED_CONFIG
from ldm.config import read_config
from ldm.job import Job
from ldm.pipeline import Pipeline, load_model
from ldm.runtime import int8, kernels
from ldm.runtime.device import resolve_precision
from ldm.runtime.prepare import prepare, rounded_layers
from ldm.util import InputError
from tests.support.golden_data import figure, relative_error, tiny_model
from tests.support.precision import needs_int8_kernels

CPU = torch.device("cpu")


def values(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def value_of(rounded):
    return rounded.scale * (rounded.bytes.float() - rounded.zero)


def step(x, low=0.0, high=0.0):
    """Half of the distance between two bytes' values, and a little for the arithmetic."""
    return (max(float(x.max()), high) - min(float(x.min()), low)) / 254 / 2 * 1.001


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shift", [-9.0, 0.0, 9.0])
def test_rounding_is_to_the_nearest_byte(dtype, shift, monkeypatch):
    monkeypatch.setattr(int8, "PIECE", 1000)  # several pieces, the last one shorter
    x = (values(7, 333) + shift).to(dtype)
    rounded = int8.as_input(x)
    assert (value_of(rounded) - x.float()).abs().max() <= step(x.float())
    assert value_of(int8.as_input(torch.zeros(3, 4))).eq(0).all()
    assert int8.as_input(rounded) is rounded


def test_maps_keep_their_place_in_memory():
    x = values(2, 5, 3, 4).contiguous(memory_format=torch.channels_last)
    for given in (x, x.contiguous()):
        rounded = int8.as_input(given)
        assert rounded.bytes.is_contiguous(memory_format=torch.channels_last)
        assert (value_of(rounded) - x).abs().max() <= step(x)


@pytest.mark.parametrize("shift", [-30.0, -0.5, 0.0, 4.0])
def test_silu_is_rounded_once(shift):
    x = 2 * values(2, 8, 6, 6) + shift
    expected = F.silu(x)
    error = (value_of(int8.as_input(int8.Silu(x.clone()))) - expected).abs().max()
    assert error <= step(expected, low=-0.2785)


def test_what_is_not_a_number_stays_visible():
    assert math.isnan(int8.as_input(torch.tensor([[1.0, math.nan]])).scale)
    for amiss in (math.inf, -math.inf, math.nan):
        assert not math.isfinite(int8.as_input(int8.Silu(torch.tensor([[1.0, amiss]]))).scale)


@needs_int8_kernels
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("side", [1, 3])
@torch.inference_mode()
def test_a_convolution_is_exact_on_whole_numbers(stride, side):
    """Inputs and weights that bytes hold without rounding, so that only the sum's own rounding is left."""
    x = torch.randint(-100, 155, (2, 16, 9, 7), generator=torch.Generator().manual_seed(1)).float()
    x[0, 0, 0, 0], x[0, 0, 0, 1] = -100, 154
    weight = torch.randint(
        -127, 128, (24, 16, side, side), generator=torch.Generator().manual_seed(2)
    ).float()
    weight[:, 0, 0, 0] = 127
    bias, padding = values(24), (side // 2, side // 2)
    packed = int8.pack_convolution(weight, torch.float32, (stride, stride), padding, x.shape)
    expected = F.conv2d(x, weight, bias, stride, padding)
    assert relative_error(int8.convolve(x, packed, bias, (stride, stride), padding), expected) <= 1e-6
    add = values(*expected.shape)
    before = add.clone()
    summed = int8.convolve(x, packed, bias, (stride, stride), padding, add)
    assert relative_error(summed, expected + before) <= 1e-6
    assert torch.equal(add, before)


@needs_int8_kernels
@torch.inference_mode()
def test_a_convolution_at_twice_the_size():
    x, weight, bias = values(2, 32, 5, 6), values(16, 32, 3, 3, seed=1) / 17, values(16)
    packed = [
        int8.pack_convolution(part, torch.float32, (1, 1), (1, 1), x.shape)
        for part in kernels.parity_weights(weight)
    ]
    expected = F.conv2d(F.interpolate(x, scale_factor=2), weight, bias, padding=1)
    assert relative_error(int8.convolve_doubled(x, packed, bias), expected) <= 2e-2


@needs_int8_kernels
@torch.inference_mode()
def test_a_product_with_what_follows_it():
    x, weight, bias = values(2, 30, 64), values(48, 64, seed=1) / 8, values(48)
    packed = int8.pack_linear(weight, torch.float32)
    expected = F.linear(x, weight, bias)
    other = values(2, 30, 48, seed=2)
    for options, wanted in (
        ({}, expected),
        ({"add": other}, expected + other),
        ({"times": other}, expected * other),
        ({"gelu": True}, F.gelu(expected)),
    ):
        assert relative_error(int8.multiply(x, packed, bias, **options), wanted) <= 2e-2


def prepared(dtype):
    model = tiny_model()
    prepare(model, dtype, lambda weight: None, int8=True)
    return model


@needs_int8_kernels
@pytest.mark.parametrize("case", ["unet", "unet_wide"])
@torch.inference_mode()
def test_the_noise_is_near_the_golden_figure(case):
    """5.9e-2 to 6.6e-2 were measured: 40 layers of 1.4e-2 each on random weights."""
    eps = prepared(torch.float32).apply_model(*(figure(f"{case}/{name}") for name in ("x", "t", "context")))
    assert 1e-2 <= relative_error(eps.float(), figure(f"{case}/eps")) <= 9e-2


@needs_int8_kernels
def test_layers_that_matter_are_not_rounded():
    model = prepared(torch.float32)
    network = model.model.diffusion_model
    rounded = {name for name, layer in network.named_modules() if getattr(layer, "kernels", None) is int8}
    products = {name for name, layer in network.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)}
    kept = {name for name in products - rounded if "emb" not in name and "attn2.to_" not in name}
    assert kept == {"input_blocks.0.0", "out.2"}
    assert {name for name in products - rounded if "attn2" in name} == {
        name for name in products if name.endswith(("attn2.to_k", "attn2.to_v"))
    }
    assert len(rounded) == len(rounded_layers(network)) > 80


@needs_int8_kernels
@pytest.mark.long
def test_pictures_of_the_bundled_model_and_a_change_of_weights():
    loaded = load_model(read_config(BUNDLED_CONFIG), BUNDLED_CKPT)
    job = Job("a red cube", width=128, height=128, steps=10, sampler="dpm_solver")
    (exact,) = Pipeline(load_model(read_config(BUNDLED_CONFIG), BUNDLED_CKPT)).make(job)
    pipeline = Pipeline(loaded, resolve_precision("int8", CPU))
    (first,) = pipeline.make(job)
    error = (torch.tensor(first.pixels).float() - torch.tensor(exact.pixels).float()).square().mean()
    assert 10 * math.log10(255**2 / float(error)) >= 40
    lowered = Pipeline(loaded, resolve_precision("int8", CPU), lowmem=True).make(job)[0]
    assert (lowered.pixels == first.pixels).all()
    weight = loaded.model.diffusion_model.middle_block[0].in_layers[2].weight
    with torch.no_grad():
        weight.mul_(0.0)
    (changed,) = pipeline.make(job)
    assert (changed.pixels != first.pixels).any()


@pytest.mark.parametrize(
    ("device", "amiss", "reason"),
    [("cpu", "no instructions", "no instructions"), ("cuda", "", "for CPUs, not cuda")],
)
def test_a_machine_without_it_refuses(device, amiss, reason, monkeypatch):
    monkeypatch.setattr(int8, "unsupported", lambda: amiss)
    with pytest.raises(InputError, match=f"--precision int8 cannot run here: .*{reason}.*; use autocast"):
        resolve_precision("int8", torch.device(device))
