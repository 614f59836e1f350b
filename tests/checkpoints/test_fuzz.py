"""Random damage: reading succeeds or raises `CheckpointError`, and all that is returned can be used."""

from __future__ import annotations

import io
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ldm.checkpoints.formats.detect import CheckpointError
from ldm.checkpoints.formats.read import read_checkpoint
from tests.support.checkpoint_files import write_zip
from tests.support.fuzzing import STATE, TARGETS, Damage, bytes_damage, members, pickle_damage
from tests.support.paths import ROOT


@pytest.mark.parametrize(
    ("count", "seed"),
    [
        (100, 0),
        pytest.param(800, 2, marks=pytest.mark.fuzz),
        pytest.param(25_000, 1, marks=[pytest.mark.fuzz, pytest.mark.slow]),
    ],
)
def test_random_damage_gives_a_state_dict_or_one_line_in_little_memory(
    tmp_path: Path, count: int, seed: int
) -> None:
    """Reads in a separate process, whose address space may grow by at most 1 GiB."""
    command = [sys.executable, "-m", "tests.support.fuzzing", str(tmp_path), str(count), str(seed)]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert child.returncode == 0, child.stderr[-2000:]
    report = json.loads(child.stdout)
    for target in TARGETS:
        outcomes = report[target]
        assert outcomes["read"] + outcomes["refused"] == count
        assert min(outcomes["read"], outcomes["refused"]) > count / 100, (target, outcomes)
    assert report["grown_mb"] < 100, report


@pytest.mark.filterwarnings("ignore:invalid escape sequence")
@pytest.mark.parametrize("count", [100, pytest.param(800, marks=pytest.mark.fuzz)])
@pytest.mark.parametrize("damage", [bytes_damage, pickle_damage])
def test_whatever_is_read_from_damage_equals_what_torch_reads(
    tmp_path: Path, damage: Damage, count: int
) -> None:
    """If both readers accept a damaged description, they must read the same tensors."""
    buffer = io.BytesIO()
    torch.save(STATE, buffer)
    records = members(buffer.getvalue())
    raw = records.pop("data.pkl")
    rng = random.Random(7)
    path = tmp_path / "damaged.ckpt"
    compared = 0
    for _ in range(count):
        path.unlink(missing_ok=True)
        write_zip(path, damage(raw, rng), records)
        try:
            found = read_checkpoint(path).state_dict
        except CheckpointError:
            continue
        try:
            expected = torch.load(path, weights_only=True)
        except Exception:  # noqa: BLE001
            continue
        theirs = {
            key: value for key, value in expected.items() if type(key) is str
        }  # classes as keys are dropped
        assert list(found) == list(theirs)
        assert all(torch.equal(found[key], value) for key, value in theirs.items())
        compared += 1
    assert compared > count / 100
