"""The safetensors reader against the safetensors library, and headers that the format forbids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch

from ldm.checkpoints.formats.detect import CheckpointError
from ldm.checkpoints.formats.read import read_checkpoint
from ldm.checkpoints.formats.tensor_bytes import FLOAT8
from tests.support.checkpoint_files import safetensors_bytes


@pytest.mark.parametrize("mmap", [True, False])
def test_every_type_equals_the_library(tmp_path: Path, mmap: bool) -> None:
    path = tmp_path / "m.safetensors"
    types = [
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        *FLOAT8,
    ]
    types += [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]
    saved = {f"{i}.{dtype}": (torch.arange(15) % 3).reshape(3, 5).to(dtype) for i, dtype in enumerate(types)}
    saved |= {
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "odd": torch.ones(3, dtype=torch.uint8),
    }
    safetensors.torch.save_file(saved, path, {"format": "pt", "note": "é"})
    checkpoint = read_checkpoint(path, mmap=mmap)
    expected = safetensors.torch.load_file(path)
    assert checkpoint.format == "safetensors" and checkpoint.metadata == {"format": "pt", "note": "é"}
    assert set(checkpoint.state_dict) == set(expected)
    for key, tensor in expected.items():
        found = checkpoint.state_dict[key]
        assert found.dtype == tensor.dtype and found.shape == tensor.shape, key
        assert found.tolist() == tensor.tolist(), key


def entry(shape: Any, offsets: Any, dtype: Any = "F32", **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def test_a_header_may_be_padded_with_spaces_and_data_may_be_unaligned(tmp_path: Path) -> None:
    header = json.dumps({"b": entry([1], [0, 1], "U8"), "a": entry([2], [1, 9])}).encode() + b"  "
    data = b"\x07" + torch.tensor([1.5, -2.0]).numpy().tobytes()
    (tmp_path / "m").write_bytes(safetensors_bytes(header, data))
    found = read_checkpoint(tmp_path / "m").state_dict
    assert found["a"].tolist() == [1.5, -2.0] and found["b"].tolist() == [7]


REFUSED_BY_BOTH = {
    "overlap": ({"a": entry([2], [0, 8]), "b": entry([2], [4, 12])}, 12),
    "hole": ({"a": entry([1], [0, 4]), "b": entry([1], [8, 12])}, 12),
    "late start": ({"a": entry([1], [4, 8])}, 8),
    "spare data": ({"a": entry([1], [0, 4])}, 5),
    "short data": ({"a": entry([2], [0, 8])}, 7),
    "backwards": ({"a": entry([1], [4, 0])}, 4),
    "unknown dtype": ({"a": entry([1], [0, 4], "F31")}, 4),
    "dtype no text": ({"a": entry([1], [0, 4], 3)}, 4),
    "reaches into the next": ({"a": entry([3], [0, 4]), "b": entry([2], [4, 12])}, 12),
    "too many bytes": ({"a": entry([1], [0, 8])}, 8),
    "wrong size": ({"a": entry([3], [0, 4])}, 4),
    "negative shape": ({"a": entry([-1], [0, 4])}, 4),
    "shape no list": ({"a": entry("1", [0, 4])}, 4),
    "fraction": ({"a": entry([1.0], [0, 4])}, 4),
    "overflow": ({"a": entry([2**62, 4], [0, 0])}, 0),
    "three offsets": ({"a": entry([1], [0, 4, 4])}, 4),
    "entry no mapping": ({"a": [1]}, 4),
    "missing dtype": ({"a": {"shape": [1], "data_offsets": [0, 4]}}, 4),
    "metadata no mapping": ({"__metadata__": ["x"], "a": entry([1], [0, 4])}, 4),
    "metadata no text": ({"__metadata__": {"x": 1}, "a": entry([1], [0, 4])}, 4),
    "not JSON": (b'{"a": ', 4),
    "not UTF-8": (b'{"\xff\xfe": {}}', 4),
    "deep JSON": (b'{"a":' * 100_000, 0),
    "two values": (b"{}{}", 0),
}


@pytest.mark.parametrize("name", REFUSED_BY_BOTH)
def test_what_the_library_refuses_is_refused(tmp_path: Path, name: str) -> None:
    header, data_bytes = REFUSED_BY_BOTH[name]
    raw = safetensors_bytes(header, bytes(data_bytes))
    (tmp_path / "m").write_bytes(raw)
    with pytest.raises(safetensors.SafetensorError):
        safetensors.torch.load(raw)
    with pytest.raises(CheckpointError) as error:
        read_checkpoint(tmp_path / "m")
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (safetensors_bytes(b'{"a": 1}        ', length=2**63), "header of 9223372036854775808 bytes"),
        (safetensors_bytes(b'{"a": 1}        ', length=100_000_001), "header of 100000001 bytes"),
        (safetensors_bytes(b'{"a": 1}        ', length=5000), "incomplete"),
        (safetensors_bytes(b"{}      "), "holds no tensors"),
        (safetensors_bytes({"__metadata__": {"a": "b"}}), "holds no tensors"),
        (safetensors_bytes({"a": entry([1], [0, 4], "F31\x1b")}, bytes(4)), r"unknown dtype 'F31\\x1b'"),
        (safetensors_bytes({"a": entry([True], [0, 4])}, bytes(4)), "natural"),
        (safetensors_bytes({"a": entry([1] * 9, [0, 4])}, bytes(4)), r"9 dimensions \(at most 8\)"),
        (safetensors_bytes({"a": entry([1], [0, 4], extra=1)}, bytes(4)), "header entry"),
    ],
)
def test_forged_headers_are_refused_with_a_reason(tmp_path: Path, raw: bytes, message: str) -> None:
    (tmp_path / "m").write_bytes(raw)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(tmp_path / "m")


@pytest.mark.parametrize(
    "header",
    [
        '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        '{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
    ],
)
def test_a_key_that_occurs_twice_is_refused(tmp_path: Path, header: str) -> None:
    """The library accepts the first of these, so two readers could see two models in one file."""
    (tmp_path / "m").write_bytes(safetensors_bytes(header.encode(), bytes(4)))
    with pytest.raises(CheckpointError, match="same key twice"):
        read_checkpoint(tmp_path / "m")
