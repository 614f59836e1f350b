"""Valid checkpoint files: the result equals that of torch or the safetensors library."""

from __future__ import annotations

import collections
import os
import pickle
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from ldm.checkpoints.formats.detect import CheckpointError
from ldm.checkpoints.formats.read import find_damaged_records, find_not_finite, read_checkpoint, read_tree
from ldm.checkpoints.formats.tensor_bytes import FLOAT8
from tests.support.checkpoint_files import (
    LIGHTNING_CLASS,
    Tensor,
    call,
    described,
    named,
    save_like_lightning,
    text,
    tiny_state_dict,
    write_zip,
)
from tests.support.paths import ROOT


def assert_same(found: Any, expected: Any) -> None:
    assert list(found) == list(expected)
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype and found[key].shape == tensor.shape
        assert torch.equal(found[key], tensor), key


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("zip_format", [True, False], ids=["zip", "legacy"])
def test_a_training_checkpoint_equals_the_tensors_that_were_saved(
    tmp_path: Path, zip_format: bool, mmap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.ckpt"
    state = tiny_state_dict()
    save_like_lightning(path, state, _use_new_zipfile_serialization=zip_format)
    for name in [name for name in sys.modules if name.startswith("pytorch_lightning")]:
        monkeypatch.delitem(sys.modules, name)  # other tests need it; reading must not import it
    checkpoint = read_checkpoint(path, mmap=mmap)
    assert checkpoint.format == ("torch zip" if zip_format else "torch legacy")
    assert checkpoint.metadata["global_step"] == 470000 and checkpoint.metadata["epoch"] == 3
    assert len(checkpoint.state_dict) == 982
    assert_same(checkpoint.state_dict, state)
    assert not any(name.startswith("pytorch_lightning") for name in sys.modules)


@pytest.mark.parametrize("zip_format", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    ],
    ids=str,
)
def test_types_and_views_equal_torch_load(tmp_path: Path, dtype: torch.dtype, zip_format: bool) -> None:
    path = tmp_path / "model.ckpt"
    base = (torch.arange(60) % 7).reshape(5, 12).to(dtype)
    saved = {
        "whole": base,
        "transposed": base.T,
        "rows": base[2:4],
        "columns": base[:, 3::4],
        "scalar": base[1, 1],
        "empty": torch.empty(0, 3, dtype=dtype),
        "expanded": base[0].expand(1, 12),
    }
    torch.save(saved, path, _use_new_zipfile_serialization=zip_format)
    assert_same(read_checkpoint(path).state_dict, torch.load(path, weights_only=True))
    shared = read_checkpoint(path).state_dict
    shared["whole"][3, 0] = 1
    assert shared["rows"][1, 0] == 1, "views of one storage stay views of one storage"
    assert torch.equal(read_checkpoint(path).state_dict["whole"], base), "the file itself is never written"


def test_tensors_outlive_the_file_and_its_reader(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    torch.save({"a": torch.arange(100_000)}, path)
    tensor = read_checkpoint(path).state_dict["a"]
    path.unlink()
    assert tensor.sum() == 100_000 * 99_999 // 2


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state},
        lambda state: {"model": state, "optimizer": {"lr": 1.0}},
        lambda state: {"state_dict": {"state_dict": state}},
        lambda state: {"model": {"state_dict": state}, "epoch": 1},
    ],
)
def test_the_state_dict_is_found_at_its_usual_places(tmp_path: Path, wrap: Any) -> None:
    state = {"betas": torch.ones(3), "model.x": torch.zeros(2)}
    torch.save(wrap(state), tmp_path / "model.ckpt")
    assert_same(read_checkpoint(tmp_path / "model.ckpt").state_dict, state)


@pytest.mark.parametrize(
    "wrapped", ["module.{}", "_orig_mod.{}", "module._orig_mod.{}", "_orig_mod.module.{}", "module.module.{}"]
)
@pytest.mark.parametrize("key", ["model.diffusion_model.x", "cond_stage_model.module_of_mine.x", "betas"])
def test_names_that_wrappers_put_before_keys_are_left_out(tmp_path: Path, wrapped: str, key: str) -> None:
    torch.save({wrapped.format(key): torch.ones(3)}, tmp_path / "model.ckpt")
    assert list(read_checkpoint(tmp_path / "model.ckpt").state_dict) == [key]


def test_a_part_that_was_compiled_is_found(tmp_path: Path) -> None:
    plain = {"first.weight": torch.ones(2, 2), "second.weight": torch.zeros(2)}
    names = {"first.weight": "module.first._orig_mod.weight", "second.weight": "module.second.weight"}
    torch.save({names[key]: tensor for key, tensor in plain.items()}, tmp_path / "model.ckpt")
    assert_same(read_checkpoint(tmp_path / "model.ckpt").state_dict, plain)


@pytest.mark.slow
def test_a_part_that_torch_compiles_is_found(tmp_path: Path) -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = torch.nn.Linear(2, 2)
            self.second = torch.nn.Linear(2, 2)

    model = Model()
    plain = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    model.first = torch.compile(model.first)  # type: ignore[assignment]
    assert "first._orig_mod.weight" in model.state_dict()
    torch.save(torch.nn.DataParallel(model).state_dict(), tmp_path / "model.ckpt")
    assert_same(read_checkpoint(tmp_path / "model.ckpt").state_dict, plain)


def test_one_key_with_and_without_a_wrapper_is_refused(tmp_path: Path) -> None:
    torch.save({"module.x": torch.ones(3), "x": torch.ones(3)}, tmp_path / "model.ckpt")
    with pytest.raises(CheckpointError, match=r"two tensors for 'x', one of them under 'module\.x'"):
        read_checkpoint(tmp_path / "model.ckpt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state_dict": [torch.ones(1)]}, "found list in"),
        ({"state_dict": torch.ones(1)}, "found Tensor in"),
        ({"state_dict": None}, "found None in"),
        ({"state_dict": {}}, "found empty mapping in"),
        ([torch.ones(1)], "found list in"),
        ({"epoch": 1, "weights": torch.ones(1)}, "'epoch' is not a tensor"),
        ({"state_dict": {1: torch.ones(1)}}, "no state dict"),
        ({"string_to_param": {"*": torch.ones(1, 768)}, "name": "cat"}, "textual inversion embedding"),
    ],
)
def test_a_file_without_a_state_dict_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "model.ckpt")
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(tmp_path / "model.ckpt")


def test_parameters_lose_what_the_file_hangs_on_them(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.arange(3.0))
    decorated = torch.nn.Parameter(torch.arange(4.0))
    decorated.detach = "from the file"  # pyright: ignore[reportAttributeAccessIssue]
    torch.save({"state_dict": {"plain": weight, "decorated": decorated}}, tmp_path / "model.ckpt")
    found = read_checkpoint(tmp_path / "model.ckpt").state_dict
    assert {type(tensor) for tensor in found.values()} == {torch.Tensor}
    assert torch.equal(found["decorated"].detach(), torch.arange(4.0))


def test_no_reader_can_pass_on_a_tensor_that_is_not_plain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "m.ckpt")
    for odd in (torch.eye(2).to_sparse(), torch.ones(1, device="meta"), torch.ones(1, dtype=torch.complex64)):
        monkeypatch.setattr("ldm.checkpoints.formats.read.read_torch_zip", lambda *_, odd=odd: {"a": odd})
        with pytest.raises(CheckpointError, match="not a plain CPU tensor"):
            read_checkpoint(tmp_path / "m.ckpt")


def test_a_parameter_dict_becomes_a_plain_mapping(tmp_path: Path) -> None:
    embedding = torch.nn.ParameterDict({"*": torch.nn.Parameter(torch.ones(2, 4))})
    torch.save({"string_to_param": embedding, "string_to_token": {"*": 265}}, tmp_path / "cat.pt")
    tree = read_tree(tmp_path / "cat.pt")
    assert type(tree["string_to_param"]) is dict and tree["string_to_token"] == {"*": 265}
    assert torch.equal(tree["string_to_param"]["*"], torch.ones(2, 4))


def test_old_and_new_numpy_names_and_python_2_names_are_known(tmp_path: Path) -> None:
    dtype = call("numpy", "dtype", text("f8"), b"\x89", b"\x88") + b"(K\x03tb"
    raw = call("_codecs", "encode", text("x" * 8), text("latin1"))
    scalars = [call(f"numpy.{core}.multiarray", "scalar", dtype, raw) for core in ("core", "_core")]
    seen = call("__builtin__", "set", b"](K\x01K\x02e")
    data = b"\x80\x02}(" + text("s") + b"](" + b"".join(scalars) + seen + b"e" + text("n") + b"K\x07u."
    assert read_tree(write_zip(tmp_path / "m.ckpt", data)) == {"s": [None, None, None], "n": 7}


def test_storages_saved_on_a_gpu_load_on_the_cpu(tmp_path: Path) -> None:
    data = described({"a": Tensor((4,), (1,))}).replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
    assert b"cuda:0" in data
    found = read_checkpoint(write_zip(tmp_path / "m.ckpt", data)).state_dict["a"]
    assert found.device.type == "cpu" and found.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("mmap", [True, False])
def test_records_at_odd_positions_are_read_right(tmp_path: Path, mmap: bool) -> None:
    """Zip tools do not pad as torch does, so a record may begin at any byte."""
    for padding in range(4):
        path = write_zip(
            tmp_path / "m.ckpt",
            described({"a": Tensor((2, 2), (1, 2))}),
            {"pad": b"." * padding, "data/0": np.arange(4, dtype="<f4").tobytes()},
        )
        found = read_checkpoint(path, mmap=mmap).state_dict["a"]
        assert found.tolist() == [[0, 2], [1, 3]] and found.data_ptr() % 4 == 0


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_other_pickle_protocols_are_read_under_the_same_rules(tmp_path: Path, protocol: int) -> None:
    value = {"a": Tensor((4,), (1,)), "note": [1, -2, 3.5, "é", True, None, (1, 2, 3, 4)]}
    tree = read_tree(write_zip(tmp_path / "m.ckpt", described(value, protocol)))
    assert tree["note"] == value["note"] and tree["a"].tolist() == [0, 1, 2, 3]


def test_hostile_key_names_are_shown_escaped(tmp_path: Path) -> None:
    torch.save({"\x1b[2J\nweights": 3, "a": torch.ones(1)}, tmp_path / "m.ckpt")
    with pytest.raises(CheckpointError) as error:
        read_checkpoint(tmp_path / "m.ckpt")
    assert "weights" in str(error.value) and str(error.value).isprintable()


def test_a_flipped_bit_is_found_and_the_record_named(tmp_path: Path) -> None:
    path = tmp_path / "m.ckpt"
    torch.save({"a": torch.zeros(1000), "b": torch.full((1000,), 7.5)}, path)
    assert find_damaged_records(path) == []
    whole = bytearray(path.read_bytes())
    whole[whole.index(np.float32(7.5).tobytes() * 500) + 41] ^= 16
    path.write_bytes(whole)
    assert find_damaged_records(path) == ["m/data/1"]


def test_a_flipped_bit_in_the_description_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.ckpt"
    torch.save({"some_name": torch.zeros(10)}, path)
    path.write_bytes(path.read_bytes().replace(b"some_name", b"same_name"))
    with pytest.raises(CheckpointError, match=r"damaged.*CRC"):
        read_checkpoint(path)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_found(tmp_path: Path, bad: float) -> None:
    torch.save(
        {"good": torch.ones(3), "bad": torch.tensor([1.0, bad]), "n": torch.arange(2)}, tmp_path / "m.ckpt"
    )
    assert find_not_finite(read_checkpoint(tmp_path / "m.ckpt").state_dict) == ["bad"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_large_numbers_are_no_damage_and_opposite_infinities_are(dtype: torch.dtype) -> None:
    most = torch.finfo(dtype).max
    tensors = {
        "large": torch.full((1000,), most, dtype=dtype),
        "both": torch.tensor([most, float("inf"), float("-inf")], dtype=dtype),
        "none": torch.empty(0, dtype=dtype),
        "whole": torch.full((9,), 2**62),
        **{f"small {kind}": torch.ones(4).to(kind) for kind in FLOAT8},
        **{f"no number {kind}": torch.tensor([1.0, float("nan")]).to(kind) for kind in FLOAT8},
    }
    assert find_not_finite(tensors) == ["both", *(f"no number {kind}" for kind in FLOAT8)]


@pytest.mark.parametrize("zip_format", [True, False], ids=["zip", "legacy"])
def test_a_whole_pickled_model_is_refused_by_name(tmp_path: Path, zip_format: bool) -> None:
    path = tmp_path / "m.ckpt"
    torch.save(torch.nn.Linear(2, 2), path, _use_new_zipfile_serialization=zip_format)
    with pytest.raises(CheckpointError, match=r"torch\.nn\.modules\.linear\.Linear|whole pickled model"):
        read_checkpoint(path)


@pytest.mark.parametrize("dtype", FLOAT8, ids=str)
def test_float8_is_read_from_the_old_format_which_torch_writes_and_cannot_read(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    whole = torch.arange(24).to(dtype).reshape(4, 6)
    for name, zip_format in (("new", True), ("old", False)):
        torch.save(
            {"a": whole[1:, ::2], "b": whole.T}, tmp_path / name, _use_new_zipfile_serialization=zip_format
        )
    expected = torch.load(tmp_path / "new", weights_only=True)
    found = read_tree(tmp_path / "old")
    for key, tensor in expected.items():
        assert found[key].dtype is dtype and found[key].stride() == tensor.stride()
        assert torch.equal(found[key].double(), tensor.double())


def test_a_type_that_is_not_read_is_named(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(3, dtype=torch.uint16)}, tmp_path / "m.ckpt")
    with pytest.raises(CheckpointError, match=r"the type torch\.uint16, which is not read here"):
        read_tree(tmp_path / "m.ckpt")


@pytest.mark.parametrize("storage, dtype", [("FloatStorage", "float8_e5m2"), ("ByteStorage", "float32")])
def test_bytes_are_seen_only_as_types_of_eight_bits(tmp_path: Path, storage: str, dtype: str) -> None:
    pid = b"(" + text("storage") + named("torch", storage) + text("0") + text("cpu") + b"K\x04tQ"
    rest = b"K\x00K\x02\x85K\x01\x85\x89}" + named("torch", dtype)
    data = b"\x80\x02}" + text("a") + call("torch._utils", "_rebuild_tensor_v3", pid, rest) + b"s."
    with pytest.raises(CheckpointError, match=r"unknown way|torch\.float32, which is not read"):
        read_tree(write_zip(tmp_path / "m.ckpt", data))


def test_an_ordered_dict_may_carry_state_and_it_is_dropped(tmp_path: Path) -> None:
    state = collections.OrderedDict(a=1)
    state.update = 5  # pyright: ignore[reportAttributeAccessIssue]
    found = read_tree(write_zip(tmp_path / "m.ckpt", pickle.dumps(state, 2)))
    assert type(found) is dict and found == {"a": 1}


def test_a_class_as_value_reads_as_none(tmp_path: Path) -> None:
    module, _, name = LIGHTNING_CLASS.rpartition(".")
    data = b"\x80\x02}" + text("callback") + named(module, name)
    assert read_tree(write_zip(tmp_path / "m.ckpt", data + b"s.")) == {"callback": None}


def test_messages_are_one_line_and_begin_with_the_path(tmp_path: Path) -> None:
    (tmp_path / "a\nb.ckpt").write_bytes(b"")
    with pytest.raises(CheckpointError) as error:
        read_checkpoint(tmp_path / "a\nb.ckpt")
    assert re.fullmatch(r".*/a\\nb\.ckpt: is empty \(0 bytes\); download it again", str(error.value))


SHRINK = """
import faulthandler, os, sys
from ldm.checkpoints.formats.read import read_checkpoint
faulthandler.enable()
for path in sys.argv[1:]:
    tensor = read_checkpoint(path).state_dict["a"]
    os.truncate(path, 0)
    print(int(tensor.sum()))
"""


@pytest.fixture
def shrinking(tmp_path: Path) -> list[Path]:
    """A file of each format with 100,000 ones."""
    paths = [tmp_path / name for name in ("zip", "legacy", "safetensors")]
    safetensors.torch.save_file({"a": torch.ones(100_000)}, paths[2])
    for path in paths[:2]:
        torch.save({"a": torch.ones(100_000)}, path, _use_new_zipfile_serialization=path.name == "zip")
    return paths


def test_tensors_that_were_read_are_kept_when_the_file_shrinks(shrinking: list[Path]) -> None:
    for path in shrinking:
        tensor = read_checkpoint(path, mmap=False).state_dict["a"]
        os.truncate(path, 0)
        assert int(tensor.sum()) == 100_000


@pytest.mark.long
def test_a_mapped_file_that_shrinks_ends_the_process_with_a_stack_trace(shrinking: list[Path]) -> None:
    """As with any map: the tensors are lost."""
    command = [sys.executable, "-c", SHRINK, *map(str, shrinking)]
    child = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert child.returncode == -signal.SIGBUS and "Fatal Python error" in child.stderr
