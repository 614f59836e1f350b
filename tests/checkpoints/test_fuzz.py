"""Damage at random: success or `CheckpointError` may come of it, and all that is returned can be read."""

from __future__ import annotations

import io
import random
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch

from ldm.checkpoints.reader import read_checkpoint
from ldm.checkpoints.sniff import CheckpointError
from tests.checkpoints.files import save_like_lightning, write_zip

STATE = {"model.a": torch.arange(6.0).reshape(2, 3).T, "model.b": torch.ones(4, dtype=torch.float16)}


def _saved(tmp_path: Path, zip_format: bool) -> bytes:
    save_like_lightning(tmp_path / "whole", STATE, _use_new_zipfile_serialization=zip_format)
    return (tmp_path / "whole").read_bytes()


def _members(whole: bytes) -> dict[str, bytes]:
    """The members of a torch zip by their names below the top folder."""
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def _mutated(raw: bytes, rng: random.Random) -> bytes:
    data = bytearray(raw)
    for _ in range(rng.choice([1, 1, 1, 2, 4, 16])):
        where = rng.randrange(len(data))
        kind = rng.randrange(5)
        if kind == 0:
            data[where] = rng.randrange(256)
        elif kind == 1:
            data[where] ^= 1 << rng.randrange(8)
        elif kind == 2:
            del data[where : where + rng.randrange(1, 9)]
        elif kind == 3:
            data[where:where] = rng.randbytes(rng.randrange(1, 5))
        else:
            source = rng.randrange(len(data))
            data[where : where + 8] = data[source : source + 8]
        if not data:
            return b"\0"
    return bytes(data)


@pytest.mark.filterwarnings("ignore:invalid escape sequence")
@pytest.mark.parametrize("target", ["zip", "pickle", "legacy", "safetensors"])
def test_random_damage_gives_a_state_dict_or_one_line(tmp_path: Path, target: str) -> None:
    if target == "safetensors":
        raw = safetensors.torch.save({key: tensor.contiguous() for key, tensor in STATE.items()})
    else:
        raw = _saved(tmp_path, target != "legacy")
    records = _members(raw) if target == "pickle" else {}
    raw = records.pop("data.pkl", raw)
    rng = random.Random(target)
    path = tmp_path / "damaged.ckpt"
    outcomes = {"read": 0, "refused": 0}
    for _ in range(1200):
        damaged = _mutated(raw, rng)
        path.unlink(missing_ok=True)  # on many disks faster than to write over it
        if target == "pickle":
            write_zip(path, damaged, records)
        else:
            path.write_bytes(damaged)
        try:
            state_dict = read_checkpoint(path, mmap=rng.random() < 0.5).state_dict
        except CheckpointError as error:
            assert str(error).isprintable() and len(str(error)) < 1000
            outcomes["refused"] += 1
        else:
            assert all(
                tensor.numel() < 10_000 and tensor.float().sum().numel() == 1
                for tensor in state_dict.values()
            )
            outcomes["read"] += 1
    assert min(outcomes.values()) > 50, outcomes


@pytest.mark.filterwarnings("ignore:invalid escape sequence")
def test_whatever_is_read_from_damage_equals_what_torch_reads(tmp_path: Path) -> None:
    """Where both readers accept a damaged description they must see the same tensors."""
    buffer = io.BytesIO()
    torch.save(STATE, buffer)
    records = _members(buffer.getvalue())
    raw = records.pop("data.pkl")
    rng = random.Random(7)
    path = tmp_path / "damaged.ckpt"
    compared = 0
    for _ in range(2000):
        path.unlink(missing_ok=True)
        write_zip(path, _mutated(raw, rng), records)
        try:
            found = read_checkpoint(path).state_dict
        except CheckpointError:
            continue
        try:
            expected = torch.load(path, weights_only=True)
        except Exception:  # noqa: BLE001
            continue
        assert {key: value.tolist() for key, value in found.items()} == {
            key: value.tolist() for key, value in expected.items()
        }
        compared += 1
    assert compared > 30
