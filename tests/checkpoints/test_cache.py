"""Cached weights are those of the checkpoint as it is, and a run with them gives the same numbers."""

import os
from pathlib import Path

import pytest
import safetensors.torch
import torch

from ldm.checkpoints import cache
from ldm.checkpoints.formats.read import read_checkpoint
from ldm.pipeline import load_model
from ldm.runtime.prepare import halved, prepare
from tests.support.golden_data import small_config, tiny_model
from tests.support.precision import needs_int8_kernels


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "small.ckpt"
    torch.save({"state_dict": tiny_model(small_config()).state_dict()}, path)
    return path


def load(checkpoint: Path, folder: Path | None, int8: bool = False):
    return load_model(small_config(), checkpoint, dtype=None, cache=folder, int8=int8)


def drawn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def outputs(model, int8=False):
    prepare(model, torch.bfloat16, lambda weight: None, int8=int8)
    with torch.inference_mode():
        yield model.apply_model(drawn(1, 4, 8, 8), torch.tensor([500]), drawn(1, 77, 16))
        yield model.decode_first_stage(drawn(1, 4, 2, 2))  # more is slow in bf16 on many CPUs
        yield model.encode_first_stage(drawn(1, 3, 64, 64)).mean
        yield model.get_learned_conditioning(["a red cube"])


@pytest.fixture(scope="module")
def cached(tmp_path_factory, checkpoint):
    """The file that a first run has cached."""
    folder = tmp_path_factory.mktemp("cache") / "not" / "there"
    load(checkpoint, folder)
    (file,) = folder.iterdir()
    return file


@pytest.mark.parametrize("int8", [False, pytest.param(True, marks=needs_int8_kernels)])
def test_the_same_numbers_from_fewer_bytes(checkpoint, tmp_path, int8):
    first = list(outputs(load(checkpoint, tmp_path, int8), int8))
    (file,) = tmp_path.iterdir()
    assert file.stat().st_size < 0.75 * checkpoint.stat().st_size
    for model in (load(checkpoint, file.parent, int8), load(checkpoint, None, int8)):
        for a, b in zip(outputs(model, int8), first, strict=True):
            assert torch.equal(a, b)


def test_what_is_rounded_is_what_runs_rounded(checkpoint, tmp_path):
    model = load(checkpoint, tmp_path)
    halves = halved(model)
    for key, value in model.state_dict().items():
        wide = key.startswith("first_stage_model.encoder") or "upsample" in key or "time_embed" in key
        assert (value.dtype is torch.bfloat16) == (key in halves), key
        assert not (wide and key in halves), key


def test_another_file_or_choice_has_a_cache_of_its_own(tmp_path):
    file, other = tmp_path / "a.ckpt", tmp_path / "b.ckpt"
    for path in (file, other):
        path.write_bytes(b"equal")
    names = {cache.cached_file(tmp_path, [file], choice) for choice in ("auto", "off")}
    os.utime(file, ns=(1, 1))
    names.add(cache.cached_file(tmp_path, [file], "auto"))
    names.add(cache.cached_file(tmp_path, [other], "auto"))
    assert len(names) == 4


@pytest.mark.parametrize("damage", [b"", b"\x10\0\0\0\0\0\0\0{", b"no safetensors at all"])
def test_a_damaged_cache_is_made_again(checkpoint, cached, tmp_path, damage, caplog):
    file = tmp_path / cached.name
    file.write_bytes(damage)
    again, expected = (load(checkpoint, folder).state_dict() for folder in (tmp_path, cached.parent))
    assert "written again" in caplog.text
    assert file.read_bytes() == cached.read_bytes()
    assert all(torch.equal(again[key], value) for key, value in expected.items())


@pytest.mark.parametrize("change", ["missing", "more", "reshaped"])
def test_a_cache_of_other_weights_is_made_again(checkpoint, cached, tmp_path, change, caplog):
    state = dict(read_checkpoint(cached).state_dict)
    key = next(key for key in state if key.startswith("first_stage_model.") and key.endswith("bias"))
    if change == "missing":
        del state[key]
    else:
        state.update({"extra": torch.ones(1)} if change == "more" else {key: state[key][:1].clone()})
    file = tmp_path / cached.name
    safetensors.torch.save_file(state, file)
    load(checkpoint, tmp_path)
    assert "holds other weights" in caplog.text
    assert file.read_bytes() == cached.read_bytes()


def test_a_full_disk_costs_the_cache_only(checkpoint, tmp_path, monkeypatch, caplog):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "write_safetensors", full)
    model = load(checkpoint, tmp_path)
    assert "No space left" in caplog.text
    assert not list(tmp_path.iterdir())
    assert torch.equal(model.betas, load(checkpoint, None).betas)


def test_what_a_killed_run_left_in_the_cache_is_removed(checkpoint, tmp_path):
    left, other = (
        tmp_path / f".{'0' * 32}.safetensors.0123abcd.part",
        tmp_path / ".x.safetensors.0123abcd.part",
    )
    for path in (left, other):
        path.touch()
    load(checkpoint, tmp_path)
    assert (left.exists(), other.exists()) == (False, True)
