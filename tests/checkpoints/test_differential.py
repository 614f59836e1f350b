"""Files of many kinds, made at random: the result equals that of `torch.load(weights_only=True)`."""

from __future__ import annotations

import collections
import itertools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from ldm.checkpoints.formats.read import read_checkpoint, read_tree
from ldm.checkpoints.formats.tensor_bytes import FLOAT8

DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)
WITH_FLOAT8 = (*DTYPES, *FLOAT8)


def some_storage(rng: random.Random, dtypes: Sequence[torch.dtype] = DTYPES) -> torch.Tensor:
    """A tensor of up to three dimensions, some of them of size 0 or 1."""
    shape = [rng.choice([0, 1, 1, 2, 3, 5]) for _ in range(rng.randrange(4))]
    numbers = torch.tensor([rng.randrange(256) for _ in range(torch.Size(shape).numel())])
    return numbers.reshape(shape).to(rng.choice(dtypes))


def some_view(base: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """`base`, or another view of it."""
    kind = rng.randrange(8)
    if kind == 1:
        return base.permute(rng.sample(range(base.ndim), base.ndim))
    if kind == 2 and base.ndim and base.numel():
        return base[rng.randrange(base.shape[0] + 1) :: rng.choice([1, 2, 3])]
    if kind == 3 and base.numel():
        return base.flatten()[rng.randrange(base.numel())]
    if kind == 4:
        return base.unsqueeze(rng.randrange(base.ndim + 1))
    if kind == 5 and base.numel() > 3:  # fewer: numbers counted twice, which is refused
        return base.as_strided((2, 2), (1, base.numel() - 2), 0)
    if kind == 6 and base.ndim and base.numel():
        return base.narrow(-1, base.shape[-1] // 2, base.shape[-1] - base.shape[-1] // 2)
    if kind == 7 and base.dtype in FLOAT8 and rng.random() < 0.5:  # bytes: the same storage under two types
        return base.view(torch.uint8)
    if kind == 7 and base.is_floating_point():
        return torch.nn.Parameter(base.detach(), requires_grad=rng.random() < 0.5)
    return base


def some_tree(rng: random.Random, storages: list[torch.Tensor], depth: int = 3) -> Any:
    kind = rng.randrange(8 if depth else 4)
    if kind < 3:
        return some_view(rng.choice(storages), rng)
    if kind == 3:
        scalars = (rng.randrange(-(2**70), 2**70), -1, 255, 1e-3, "text é\x1b", "", None, True, False)
        return rng.choice(scalars)
    values = [some_tree(rng, storages, depth - 1) for _ in range(rng.randrange(5))]
    if kind == 4:
        return values
    if kind == 5:
        return tuple(values)
    names = rng.sample(["a", "b.weight", "1", "é", "x" * 300, "", 1, -5, None], len(values))
    pairs = zip(names, values, strict=True)
    return dict(pairs) if kind == 6 else collections.OrderedDict(pairs)


def assert_equal(found: Any, expected: Any, seen: dict[int, int]) -> None:
    """Equal in everything; tensors that share memory in one tree share it in the other (`seen`: theirs -> ours)."""
    if isinstance(expected, torch.Tensor):
        assert type(found) is torch.Tensor and (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert found.stride() == expected.stride() and found.storage_offset() == expected.storage_offset()
        assert torch.equal(
            *(t.detach().view(torch.uint8) if t.dtype in FLOAT8 else t.detach() for t in (found, expected))
        )
        if expected.untyped_storage().nbytes():
            storage = found.untyped_storage().data_ptr()
            assert seen.setdefault(expected.untyped_storage().data_ptr(), storage) == storage
    elif isinstance(expected, dict):
        assert isinstance(found, dict) and list(found) == list(expected)
        for key, value in expected.items():
            assert_equal(found[key], value, seen)
    elif isinstance(expected, (list, tuple)):
        assert type(found) is type(expected) and len(found) == len(expected)
        for ours, theirs in zip(found, expected, strict=True):
            assert_equal(ours, theirs, seen)
    else:
        assert type(found) is type(expected) and found == expected


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("zip_format", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    ("first", "count"),
    [
        (0, 40),
        pytest.param(1000, 150, marks=pytest.mark.fuzz),
        pytest.param(10_000, 5_000, marks=[pytest.mark.fuzz, pytest.mark.slow]),
    ],
)
def test_what_torch_saved_is_read_as_torch_reads_it(
    tmp_path: Path, zip_format: bool, mmap: bool, first: int, count: int
) -> None:
    path = tmp_path / "m.ckpt"
    tensors = 0
    for seed in range(first, first + count):
        rng = random.Random(seed)
        storages = [some_storage(rng, WITH_FLOAT8 if zip_format else DTYPES) for _ in range(3)]
        tree = {"state_dict": some_tree(rng, storages), "more": some_tree(rng, storages)}
        path.unlink(missing_ok=True)
        torch.save(tree, path, _use_new_zipfile_serialization=zip_format)
        seen: dict[int, int] = {}
        assert_equal(read_tree(path, mmap=mmap), torch.load(path, weights_only=True), seen)
        tensors += len(seen)
    assert tensors > count, "most files hold tensors"


@pytest.mark.parametrize("count", [25, pytest.param(100, marks=pytest.mark.fuzz)])
@pytest.mark.parametrize("mmap", [True, False])
def test_what_the_safetensors_library_saved_is_read_as_it_reads_it(
    tmp_path: Path, mmap: bool, count: int
) -> None:
    path = tmp_path / "m.safetensors"
    for seed in range(count):
        rng = random.Random(seed)
        saved = {f"{i}é": some_storage(rng, WITH_FLOAT8) for i in range(rng.randrange(1, 6))}
        path.unlink(missing_ok=True)
        safetensors.torch.save_file(saved, path)
        found, expected = read_checkpoint(path, mmap=mmap).state_dict, safetensors.torch.load_file(path)
        assert set(found) == set(expected)
        for key in expected:
            assert_equal(found[key], expected[key], {})


@pytest.mark.parametrize("zip_format", [True, False], ids=["zip", "legacy"])
def test_a_storage_longer_than_its_tensors_keeps_its_hidden_numbers(tmp_path: Path, zip_format: bool) -> None:
    """torch saves whole storages: a slice brings the rest with it, in both readers."""
    path = tmp_path / "m.ckpt"
    whole = torch.arange(1000.0)
    torch.save({"slice": whole[500:502]}, path, _use_new_zipfile_serialization=zip_format)
    for tensor in (read_tree(path)["slice"], torch.load(path, weights_only=True)["slice"]):
        assert tensor.untyped_storage().nbytes() == 4000 and tensor.tolist() == [500, 501]


def test_the_generator_makes_every_kind() -> None:
    """The comparison above means something only if the files are as different as they look."""
    kinds = collections.Counter()
    for seed in range(150):
        rng = random.Random(seed)
        storages = [some_storage(rng, WITH_FLOAT8) for _ in range(3)]
        for _ in range(8):
            view = some_view(rng.choice(storages), rng)
            kinds[view.dtype] += 1
            kinds["parameter"] += isinstance(view, torch.nn.Parameter)
            kinds["offset"] += view.storage_offset() > 0
            kinds["strided"] += not view.is_contiguous()
            kinds["empty"] += view.numel() == 0
            kinds["scalar"] += view.ndim == 0
    wanted = itertools.chain(WITH_FLOAT8, ["parameter", "offset", "strided", "empty", "scalar"])
    assert all(kinds[name] >= 10 for name in wanted), kinds
