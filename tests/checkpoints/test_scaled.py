"""Weights in 8 bits: written by convert, read from GGUF, and as float weights to everything else."""

import struct

import pytest
import torch

import ldm.scaled
import scripts.convert as convert_script
from ldm.checkpoints.configs import BUNDLED_CKPT, BUNDLED_CONFIG
from ldm.checkpoints.formats.detect import CheckpointError
from ldm.checkpoints.formats.read import read_checkpoint
from ldm.checkpoints.formats.write import write_safetensors
from ldm.checkpoints.inspect import inspect_path
from ldm.config import read_config
from ldm.job import Job
from ldm.pipeline import Pipeline, load_model
from ldm.runtime.device import FULL, resolve_precision
from ldm.scaled import ScaledWeight, round_weight
from tests.support.precision import needs_int8_kernels

CPU = torch.device("cpu")


def values(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def test_a_rounded_weight_is_a_float_weight_to_others():
    weight = values(6, 4, 3, 3)
    scaled = ScaledWeight(*round_weight(weight))
    error = (scaled - weight).abs().amax((1, 2, 3))
    assert (error <= weight.abs().amax((1, 2, 3)) / 254 * 1.001).all()
    assert scaled.is_floating_point()
    again, scale = round_weight(scaled)
    assert torch.equal(again, scaled.whole)
    assert torch.allclose(scale, scaled.scale, rtol=1e-6)
    linear = torch.nn.Linear(4, 6, device="meta")
    matrix = ScaledWeight(*round_weight(weight[:, :, 0, 0]))
    linear.load_state_dict({"weight": matrix, "bias": torch.zeros(6)}, assign=True)
    assert isinstance(linear.weight, ScaledWeight)
    assert torch.equal(linear(torch.eye(4)), matrix.values().t())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_weight_is_rounded_the_same_in_pieces(dtype, monkeypatch):
    weight = values(7, 5, 3, 3).to(dtype)
    weight[3] = 0
    whole, scale = round_weight(weight)
    assert torch.equal(scale, (weight.float().abs().amax((1, 2, 3)) / 127).clamp(min=scale[3]))
    assert torch.equal(whole, (weight.float() / scale[:, None, None, None]).round().to(torch.int8))
    monkeypatch.setattr(ldm.scaled, "_PIECE", 100)  # two channels at a time
    assert all(torch.equal(a, b) for a, b in zip(round_weight(weight), (whole, scale), strict=True))


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    out = tmp_path_factory.mktemp("int8") / "small.safetensors"
    assert convert_script.main([BUNDLED_CKPT, str(out), "--dtype", "int8", "--quiet"]) == 0
    return out


def test_convert_writes_a_file_that_loads_without_float_weights(converted):
    read = read_checkpoint(converted).state_dict
    scaled = [tensor for tensor in read.values() if isinstance(tensor, ScaledWeight)]
    assert len(scaled) > 80
    model = load_model(read_config(BUNDLED_CONFIG), converted, dtype=None)
    kept = [weight for weight in model.parameters() if isinstance(weight, ScaledWeight)]
    assert len(kept) == len(scaled)
    assert converted.stat().st_size < 0.8 * sum(weight.numel() * 2 for weight in model.parameters())
    (found,) = inspect_path(converted)
    assert found.sound
    assert found.precisions["int8"] == sum(weight.numel() for weight in kept)


@pytest.mark.long
@needs_int8_kernels
def test_the_file_gives_the_images_of_the_model_it_was_made_of(converted):
    """In int8 the same weights are rounded either way; the rest differs by float16's rounding at most."""
    job = Job("a red cube", width=64, height=64, steps=3, sampler="dpm_solver")
    images = []
    for ckpt, precision in ((BUNDLED_CKPT, "int8"), (converted, "int8"), (converted, "full")):
        model = load_model(read_config(BUNDLED_CONFIG), ckpt, dtype=None)
        images.append(Pipeline(model, resolve_precision(precision, CPU)).make(job)[0].pixels.astype(float))
    assert abs(images[0] - images[1]).mean() <= 1
    assert abs(images[0] - images[2]).mean() <= 4


def test_convert_refuses_what_int8_cannot_be(tmp_path, capsys):
    assert convert_script.main([BUNDLED_CKPT, str(tmp_path / "a.ckpt"), "--dtype", "int8"]) == 2
    assert "--dtype int8 writes a safetensors file" in capsys.readouterr().err


def test_scales_that_do_not_fit_are_refused(tmp_path):
    small, scale = round_weight(values(6, 4))
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"a.weight": small, "a.weight_scale": scale[:5].clone()}, None, {})
    with pytest.raises(CheckpointError, match=r"a.weight.*has scales of torch.float32 and shape .5."):
        read_checkpoint(path)


# --- GGUF -------------------------------------------------------------------------------------------------------


def write_gguf(path, tensors, shapes=(), kind="Q8_0"):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "sd1")
    for name, shape in shapes:
        writer.add_array(f"comfy.gguf.orig_shape.{name}", list(shape))
    for name, tensor in tensors.items():
        whole = tensor.numpy()
        if tensor.dim() == 2 and tensor.shape[1] % 32 == 0:
            packed = gguf.quants.quantize(whole, gguf.GGMLQuantizationType[kind])
            writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType[kind])
        else:
            writer.add_tensor(name, whole)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return gguf


@pytest.mark.parametrize("mmap", [True, False])
def test_gguf_is_read_as_its_own_library_reads_it(tmp_path, mmap):
    path = tmp_path / "a.gguf"
    tensors = {
        "matrix": values(5, 64),
        "kernel": values(6, 4, 3, 3).half(),
        "flat": values(8, 32),
        "bias": values(7),
    }
    gguf = write_gguf(path, tensors, [("flat", (8, 8, 2, 2))])
    read = read_checkpoint(path, mmap).state_dict
    for entry in gguf.GGUFReader(path).tensors:
        expected = torch.from_numpy(gguf.quants.dequantize(entry.data, entry.tensor_type).copy())
        assert torch.equal(read[entry.name].float().reshape(-1), expected.reshape(-1))
    assert read["kernel"].shape == (6, 4, 3, 3)
    assert read["flat"].shape == (8, 8, 2, 2)
    assert isinstance(read["matrix"], ScaledWeight)


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", ""])
def test_a_gguf_model_makes_the_same_image(tmp_path, prefix):
    """stable-diffusion.cpp's files have the whole model under CompVis's names, ComfyUI-GGUF's the bare U-Net."""
    whole = read_checkpoint(BUNDLED_CKPT).state_dict
    unet = "model.diffusion_model."
    chosen = {k.replace(unet, prefix): v.float() for k, v in whole.items() if prefix or k.startswith(unet)}
    path = tmp_path / "a.gguf"
    write_gguf(path, {key: value.contiguous() for key, value in chosen.items() if value.is_floating_point()})
    job = Job("a red cube", width=64, height=64, steps=2, sampler="dpm_solver")
    parts = {} if prefix else {"vae": BUNDLED_CKPT, "text_encoder": BUNDLED_CKPT}
    made = [
        Pipeline(load_model(read_config(BUNDLED_CONFIG), ckpt, **more), FULL)
        .make(job)[0]
        .pixels.astype(float)
        for ckpt, more in ((path, parts), (BUNDLED_CKPT, {}))
    ]
    assert 0 < abs(made[0] - made[1]).mean() <= 3


def test_gguf_in_other_types_is_refused_by_name(tmp_path):
    path = tmp_path / "a.gguf"
    write_gguf(path, {"a": values(4, 64)}, kind="Q4_0")
    with pytest.raises(CheckpointError, match=r"has weights in q4_0 .*reads f32, f16, bf16 and q8_0"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (struct.pack("<IQQ", 9, 1, 0), "version 9"),
        (struct.pack("<IQQ", 3, 2**40, 0), "more than"),
        (struct.pack("<IQQQ", 3, 1, 1, 2**50), "text of"),
        (struct.pack("<IQQQ3sIIQ", 3, 1, 1, 3, b"abc", 9, 4, 2**60), "incomplete"),
        (struct.pack("<IQQQ3sI", 3, 1, 1, 3, b"abc", 99), "unknown type 99"),
        (struct.pack("<IQQQ3sIQQIQ", 3, 1, 0, 3, b"abc", 2, 2**40, 2**40, 0, 0), "too many elements"),
        (struct.pack("<IQQQ3sIQIQ", 3, 1, 0, 3, b"abc", 1, 64, 0, 0), "incomplete"),
        (struct.pack("<IQQQ3sIQIQ", 3, 1, 0, 3, b"abc", 1, 33, 8, 0), "whole blocks"),
    ],
)
def test_a_hostile_gguf_is_refused(tmp_path, body, reason):
    path = tmp_path / "a.gguf"
    path.write_bytes(b"GGUF" + body)
    with pytest.raises(CheckpointError, match=reason):
        read_checkpoint(path)
