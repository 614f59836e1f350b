"""Edges that meet: what is rolled comes out rolled, plain and packed."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from ldm.job import Job
from ldm.pipeline import Pipeline
from ldm.runtime.fast import accelerate
from ldm.runtime.packing import Packer
from ldm.runtime.prepare import rounded_layers, use_int8
from ldm.runtime.seamless import Seamless
from tests.support.golden_data import relative_error, small_config, tiny_model
from tests.support.precision import EACH_PACKED, needs_int8_kernels

# what is rolled must stay on the same rows of all four levels: 8 latent cells, 64 pixels
SHIFTS = {"x": (0, 8), "y": (8, 0), "both": (8, 16)}


@pytest.fixture(
    scope="module",
    params=[None, *EACH_PACKED, pytest.param("int8", marks=needs_int8_kernels)],
    ids=["plain", "float32", "bf16", "int8"],
)
def networks(request):
    model = tiny_model(small_config())
    dtype = torch.float32 if request.param == "int8" else request.param
    if dtype is not None:
        for part in (model.model.diffusion_model, model.first_stage_model):
            accelerate(part, Packer(dtype, lambda weight: None))
    if request.param == "int8":
        use_int8(rounded_layers(model.model.diffusion_model))
    if (
        request.param == "int8"
    ):  # a change in the last bit of a float moves some bytes: 5e-2 were measured for it
        return model, 8e-2, 4 * 8e-2
    allowed = 2e-2 if request.param == torch.bfloat16 else 5e-6
    return model, allowed, 10 * allowed


def inputs():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 4, 16, 24, generator=generator)
    return x, torch.tensor([500, 500]), torch.randn(2, 77, 16, generator=generator)


@pytest.mark.parametrize("axes", [pytest.param("x", marks=pytest.mark.slow), "y", "both"])
@torch.inference_mode()
def test_what_is_rolled_comes_out_rolled(networks, axes):
    model, allowed, distinct = networks
    unet, vae, shift = model.model.diffusion_model, model.first_stage_model, SHIFTS[axes]
    x, t, context = inputs()
    plain = unet(x, t, context)
    rows, columns = shift
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(4))
    wrap = Seamless()
    wrap.apply([unet, vae], axes)
    try:
        found = unet(x.roll(shift, (2, 3)), t, context).roll((-rows, -columns), (2, 3))
        assert relative_error(found.float(), unet(x, t, context).float()) <= allowed
        assert relative_error(found.float(), plain.float()) > distinct
        decoded = vae.decode(x.roll(shift, (2, 3))).roll((-8 * rows, -8 * columns), (2, 3))
        assert relative_error(decoded.float(), vae.decode(x).float()) <= allowed
        encoded = vae.encode(image.roll((8 * (rows > 0), 8 * (columns > 0)), (2, 3))).mean
        back = encoded.roll((-int(rows > 0), -int(columns > 0)), (2, 3))
        assert relative_error(back.float(), vae.encode(image).mean.float()) <= allowed
    finally:
        wrap.apply([], "none")
    assert torch.equal(unet(x, t, context), plain)


@torch.inference_mode()
def test_the_interior_is_a_convolution_with_circular_padding():
    layer = torch.nn.Conv2d(3, 5, 3, padding=1)
    circular = torch.nn.Conv2d(3, 5, 3, padding=1, padding_mode="circular")
    circular.load_state_dict(layer.state_dict())
    x = torch.randn(1, 3, 9, 12, generator=torch.Generator().manual_seed(5))
    wrap = Seamless()
    wrap.apply([layer], "both")
    assert torch.allclose(layer(x), circular(x), atol=1e-6)


@pytest.mark.slow
def test_a_job_with_its_noise_rolled():
    pipeline = Pipeline(tiny_model(small_config()))
    code = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(6))
    job = Job("a red cube", width=128, height=128, steps=2, seamless="both")
    a, b = (
        pipeline.make([job], start_code=z)[0].pixels.astype(int) for z in (code, code.roll((8, 8), (2, 3)))
    )
    assert abs(np.roll(a, (64, 64), (0, 1)) - b).max() <= 1
    c, d = (
        pipeline.make([replace(job, seamless="none")], start_code=z)[0].pixels.astype(int)
        for z in (code, code.roll((8, 8), (2, 3)))
    )
    assert abs(np.roll(c, (64, 64), (0, 1)) - d).max() > 5
