"""Files made to do harm: nothing runs, nothing is imported, nothing is read from outside its record."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.checkpoints.formats.detect import CheckpointError
from ldm.checkpoints.formats.pickle_reader import read_pickle
from ldm.checkpoints.formats.read import read_checkpoint, read_tree
from tests.support.checkpoint_files import (
    StorageId,
    Tensor,
    call,
    described,
    named,
    safetensors_bytes,
    text,
    write_zip,
)
from tests.support.paths import ROOT

ORDERED_DICT = named("collections", "OrderedDict") + b")R"
RUN = "import os; os.environ['CANARY'] = 'dead'; open(os.environ['CANARY_FILE'], 'w')"


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A file that must not appear, a variable that must not change, a module that must not be imported."""
    trace = tmp_path / "canary"
    (tmp_path / "canary_module.py").write_text(RUN)
    monkeypatch.setenv("CANARY_FILE", str(trace))
    monkeypatch.setenv("CANARY", "alive")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    assert not trace.exists() and os.environ["CANARY"] == "alive" and "canary_module" not in sys.modules


def as_legacy(data: bytes, keys: tuple[str, ...] = (), version: int = 1001, little: Any = True) -> bytes:
    """The pickles of a file in the old format around `data`, the fourth of them."""
    system = {"protocol_version": version, "little_endian": little, "type_sizes": {}}
    front = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, version, system)]
    return b"".join(front) + data + pickle.dumps(list(keys), 2)


SHELL = text("touch $CANARY_FILE")
PAYLOADS = {
    "os.system": call("os", "system", SHELL),
    "posix.system": call("posix", "system", SHELL),
    "subprocess.Popen": call("subprocess", "Popen", SHELL),
    "builtins.eval": call("builtins", "eval", text(f"exec({RUN!r})")),
    "__builtin__.exec": call("__builtin__", "exec", text(RUN)),
    "builtins.__import__": call("builtins", "__import__", text("canary_module")),
    "runpy._run_code": call("runpy", "_run_code", text(RUN), b"}"),
    "builtins.getattr": call(
        "builtins", "getattr", call("builtins", "__import__", text("os")), text("system")
    ),
    "numpy.testing._private.utils.runstring": call(
        "numpy.testing._private.utils", "runstring", text(RUN), b"}"
    ),
    "torch.load": call("torch", "load", text("evil.pt")),
    "torch.hub.load": call("torch.hub", "load", text("evil/repo"), text("model")),
    "torch.jit.load": call("torch.jit", "load", text("evil.pt")),
    "pkgutil.resolve_name": call("pkgutil", "resolve_name", text("os:system")),
    "operator.methodcaller": call("operator", "methodcaller", text("system"), SHELL),
    "logging.FileHandler": call("logging", "FileHandler", text("canary")),
    "canary_module.anything": named("canary_module", "anything"),
    "collections.OrderedDict.fromkeys": call("collections", "OrderedDict.fromkeys", b"]"),
    "torch._utils._rebuild_tensor_v2.__globals__": named("torch._utils", "_rebuild_tensor_v2.__globals__"),
}


@pytest.mark.usefixtures("canary")
@pytest.mark.parametrize("layout", ["zip", "legacy"])
@pytest.mark.parametrize("name", PAYLOADS)
def test_a_name_outside_the_table_is_refused_and_named(tmp_path: Path, name: str, layout: str) -> None:
    data = b"\x80\x02" + PAYLOADS[name] + b"."
    path = tmp_path / "evil.ckpt"
    if layout == "zip":
        write_zip(path, data)
    else:
        path.write_bytes(as_legacy(data))
    with pytest.raises(CheckpointError, match="refused, nothing was run") as error:
        read_checkpoint(path)
    assert f"asks to import {name};" in str(error.value)


@pytest.mark.usefixtures("canary")
def test_protocol_4_names_are_refused_and_named(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.system, ("touch $CANARY_FILE",)

    data = pickle.dumps({"state_dict": Evil()}, 4)
    assert b"\x93" in data, "the payload uses STACK_GLOBAL"
    with pytest.raises(CheckpointError, match=r"asks to import (posix|nt)\.system; refused"):
        read_checkpoint(write_zip(tmp_path / "evil.ckpt", data))


@pytest.mark.usefixtures("canary")
@pytest.mark.parametrize(
    ("instructions", "name"),
    [
        (b"(X\x01\x00\x00\x00aios\nsystem\n", "INST"),
        (b"(" + ORDERED_DICT + b"o", "OBJ"),
        (b"\x82\x01", "EXT1"),
        (b"Pname\n", "PERSID"),
        (b"S'text'\n", "STRING"),
        (b"I01\n", "INT"),
        (b"K\x010", "POP"),
        (b"K\x012", "DUP"),
        (b"\x8f", "EMPTY_SET"),
        (b"\x96\x01\x00\x00\x00\x00\x00\x00\x00a", "BYTEARRAY8"),
        (ORDERED_DICT + b")}\x92", "NEWOBJ_EX"),
    ],
)
def test_instructions_that_torch_does_not_write_are_refused_and_named(
    tmp_path: Path, instructions: bytes, name: str
) -> None:
    with pytest.raises(CheckpointError, match=f"pickle instruction {name},"):
        read_checkpoint(write_zip(tmp_path / "evil.ckpt", b"\x80\x02" + instructions + b"."))


STORAGE_ID = b"(" + text("storage") + named("torch", "FloatStorage") + text("0") + text("cpu") + b"K\x04tQ"
TENSOR = call("torch._utils", "_rebuild_tensor_v2", STORAGE_ID, b"K\x00K\x04\x85K\x01\x85\x89" + ORDERED_DICT)


@pytest.mark.parametrize(
    "instructions",
    [
        TENSOR + b"}" + text("offset") + b"J\xff\xff\xff\x7fsb",
        TENSOR + b"N}" + text("size") + b"J\xff\xff\xff\x7f\x85s\x86b",
        STORAGE_ID + b"N}" + text("count") + b"K\xffs\x86b",
        named("torch._utils", "_rebuild_tensor_v2") + b"N}" + text("__defaults__") + b")s\x86b",
        named("collections", "OrderedDict") + b"}" + text("__init__") + b"Nsb",
        named("torch", "FloatStorage") + b"}" + text("itemsize") + b"K\x00sb",
        b"]}" + text("append") + b"Nsb",
        named("torch", "FloatStorage") + b")R",
        named("torch", "FloatStorage") + b")\x81",
        b"}" + TENSOR + b"K\x01s",
        b"K\x01)R",
        STORAGE_ID + b")R",
        named("collections", "OrderedDict") + b"K\x01R",
        call("collections", "OrderedDict", b"]"),
        named("torch._utils", "_rebuild_parameter") + b"K\x01\x85R",
        named("torch._utils", "_rebuild_parameter") + b")R",
        call("torch._utils", "_rebuild_tensor_v2", b"K\x00K\x00))"),
        call("torch.nn.modules.container", "ParameterDict") + b"K\x01b",
        b"(" + text("module") + named("torch", "FloatStorage") + b"tQ",
        b"K\x01Q",
        b"(" + text("storage") + text("0") + text("0") + text("cpu") + b"K\x04tQ",
        b"(" + text("storage") + named("torch", "FloatStorage") + b"K\x00" + text("cpu") + b"K\x04tQ",
        b"]K\x01e",
        b"a",
        b"\x86",
        b"h\x07",
        b"",
    ],
)
def test_objects_cannot_be_changed_or_called_by_the_file(tmp_path: Path, instructions: bytes) -> None:
    with pytest.raises(CheckpointError):
        read_tree(write_zip(tmp_path / "evil.ckpt", b"\x80\x02" + instructions + b"."))


def test_state_on_an_accepted_object_leaves_no_trace(tmp_path: Path) -> None:
    """BUILD with a `__setstate__` from the file, then a second BUILD: an attack on placeholder objects."""
    state = b"}" + text("__setstate__") + named("collections", "OrderedDict") + b"s"
    data = b"\x80\x02" + ORDERED_DICT + state + b"b}" + text("command") + b"K\x01sb."
    assert read_tree(write_zip(tmp_path / "m.ckpt", data)) == {}
    assert read_tree(write_zip(tmp_path / "m.ckpt", described({"a": Tensor((4,), (1,))})))["a"].shape == (4,)


@pytest.mark.parametrize(
    ("size", "stride", "offset", "count"),
    [
        ((5,), (1,), 0, 5),
        ((2**60,), (1,), 0, 2**60),
        ((5,), (1,), 0, 4),
        ((4,), (1,), 1, 4),
        ((2, 2), (3, 1), 0, 4),
        ((1,), (1,), 4, 4),
        ((0,), (1,), 5, 4),
        ((4,), (1,), -1, 4),
        ((-4,), (1,), 0, 4),
        ((2,), (-1,), 1, 4),
        ((4,), (1,), 0, -4),
        ((10**6, 10**6), (0, 0), 0, 4),
        ((5,), (0,), 0, 4),
        ((2**32, 2**32), (0, 0), 0, 4),
        ((0, 2**63), (1, 1), 0, 4),
        ((4,), (2**63,), 0, 4),
        ((1,) * 9, (1,) * 9, 0, 4),
        ((4,), (1, 1), 0, 4),
        ((4.0,), (1,), 0, 4),
        ((True,), (1,), 0, 4),
        ([4], [1], 0, 4),
        ("4", "1", 0, 4),
        ((4,), (1,), None, 4),
        ((4,), (1,), 0, True),
        ((3,), (1,), 0, 3),
    ],
)
@pytest.mark.parametrize("mmap", [True, False])
def test_descriptions_that_do_not_fit_their_record_are_refused(
    tmp_path: Path, mmap: bool, size: Any, stride: Any, offset: Any, count: Any
) -> None:
    data = described({"some.weight": Tensor(size, stride, offset, count)})
    with pytest.raises(CheckpointError) as error:
        read_checkpoint(write_zip(tmp_path / "evil.ckpt", data), mmap=mmap)
    assert "is damaged" not in str(error.value), "refused on purpose, not by an accident further on"


def test_the_key_of_a_forged_tensor_is_named(tmp_path: Path) -> None:
    data = described({"state_dict": {"some.weight": Tensor((10**6, 10**6), (0, 0))}})
    with pytest.raises(
        CheckpointError, match=r"tensor 'some\.weight' \(record '0'\) of shape \[1000000, 1000000\]"
    ):
        read_checkpoint(write_zip(tmp_path / "evil.ckpt", data))


@pytest.mark.parametrize("key", ["1", "../data.pkl", "", "0\x00"])
def test_a_record_that_is_not_there_is_refused(tmp_path: Path, key: str) -> None:
    data = described({"a": Tensor((4,), (1,), key=key)})
    with pytest.raises(CheckpointError, match="no such record"):
        read_checkpoint(write_zip(tmp_path / "evil.ckpt", data))


GOOD = described({"a": Tensor((4,), (1,))})


def _write_members(path: Path, members: list[tuple[str, bytes]]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members:
            archive.writestr(name, content)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a/data.pkl", GOOD), ("a/data/0", b"x" * 16), ("a/data/0", b"y" * 16)], "same member twice"),
        ([("a/data.pkl", GOOD), ("a/data.pkl", GOOD), ("a/data/0", b"x" * 16)], "2 data.pkl"),
        ([("a/data.pkl", GOOD), ("b/data.pkl", GOOD), ("a/data/0", b"x" * 16)], "2 data.pkl"),
        ([("a/data.pkl", GOOD), ("b/data/0", b"x" * 16)], "outside of its folder"),
        ([("a/data.pkl", GOOD), ("data/0", b"x" * 16)], "outside of its folder"),
        ([("notes.txt", b"hello")], "0 data.pkl"),
        ([("a/data.pkl", GOOD), ("a/byteorder", b"big"), ("a/data/0", b"x" * 16)], "big-endian"),
        ([("a/data.pkl", GOOD), ("a/data/0", b"x" * 15)], "a record of 15 bytes"),
        ([("a/data.pkl", GOOD), ("a/code/m.py", b"x"), ("a/data/0", b"x" * 16)], "TorchScript"),
    ],
)
def test_archives_with_two_readings_are_refused(tmp_path: Path, members: Any, message: str) -> None:
    _write_members(tmp_path / "evil.ckpt", members)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(tmp_path / "evil.ckpt")


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressed_members_are_refused(tmp_path: Path, compression: int) -> None:
    with pytest.raises(CheckpointError, match="compressed member"):
        read_checkpoint(write_zip(tmp_path / "m.ckpt", GOOD, compression=compression))


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        lambda whole, other: whole + other,
        lambda whole, other: b"PK\x03\x04" + bytes(60) + whole,
        lambda whole, other: whole[:-2] + b"\x04\x00note",
        lambda whole, other: whole + b"x",
    ],
    ids=["two archives", "bytes in front", "comment", "bytes behind"],
)
def test_an_archive_that_is_not_the_whole_file_is_refused(tmp_path: Path, mmap: bool, change: Any) -> None:
    """Of two archives in a row torch reads the first, and Python's zipfile the second."""
    whole = write_zip(tmp_path / "a", GOOD).read_bytes()
    other = write_zip(tmp_path / "b", described({"b": Tensor((4,), (1,))})).read_bytes()
    (tmp_path / "evil.ckpt").write_bytes(change(whole, other))
    with pytest.raises(CheckpointError, match=r"before or after its zip archive|incomplete"):
        read_checkpoint(tmp_path / "evil.ckpt", mmap=mmap)


def test_torch_and_zipfile_do_not_agree_on_two_archives(tmp_path: Path) -> None:
    """Why the test above matters: if this ever fails, both read the same."""
    whole = write_zip(tmp_path / "a", GOOD).read_bytes()
    other = write_zip(tmp_path / "b", described({"b": Tensor((4,), (1,))})).read_bytes()
    (tmp_path / "evil.ckpt").write_bytes(whole + other)
    with zipfile.ZipFile(tmp_path / "evil.ckpt") as archive:
        assert archive.read("archive/data.pkl") == described({"b": Tensor((4,), (1,))})
    assert list(torch.load(tmp_path / "evil.ckpt", weights_only=True)) == ["a"]


@pytest.mark.parametrize("members", [1, pytest.param(66_000, marks=pytest.mark.slow)])
def test_archives_with_the_large_end_record_are_read(tmp_path: Path, members: int) -> None:
    """More than 65535 members need the format's second, 64-bit end record; a forged one is refused."""
    path = write_zip(
        tmp_path / "m.ckpt", GOOD, {"data/0": bytes(16), **{f"x/{i}": b"" for i in range(members)}}
    )
    assert read_checkpoint(path).state_dict["a"].shape == (4,)
    whole = bytearray(path.read_bytes())
    if members > 65535:
        whole[-22 - 20 + 8] ^= 1  # the start of the record by the locator
        path.write_bytes(whole)
        with pytest.raises(CheckpointError, match="before or after"):
            read_checkpoint(path)


def _patch_directory(path: Path, offset: int, value: bytes) -> None:
    """Writes into the zip directory's entry of the last member."""
    whole = bytearray(path.read_bytes())
    entry = whole.rindex(b"PK\x01\x02")
    whole[entry + offset : entry + offset + len(value)] = value
    path.write_bytes(whole)


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (8, b"\x01\x00", "encrypted"),
        (10, b"\x63\x00", "compressed member"),
        (20, b"\xff\xff\xff\x7f\xff\xff\xff\x7f", "more bytes than the file"),
        (20, b"\x10\x00\x00\x00\x20\x00\x00\x00", "compressed member"),
        (42, b"\x03\x00\x00\x00", "no header where"),
        (42, b"\xf0\xff\xff\x7f", "incomplete"),
        (42, b"\x00\x00\x00\x00", "another name for 'archive/data/0'"),
    ],
)
def test_a_forged_zip_directory_is_refused(tmp_path: Path, offset: int, value: bytes, message: str) -> None:
    path = write_zip(tmp_path / "evil.ckpt", GOOD)
    _patch_directory(path, offset, value)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw[:-1], "incomplete"),
        (lambda raw: raw[:-17], "incomplete"),
        (lambda raw: raw + b"x", "1 bytes after its last record"),
        (lambda raw: raw[:-24] + b"\x05" + raw[-23:], "5 elements in record '0'"),
    ],
)
def test_legacy_records_must_fill_the_file_exactly(tmp_path: Path, change: Any, message: str) -> None:
    raw = as_legacy(GOOD, ("0",)) + (4).to_bytes(8, "little") + bytes(16)
    path = tmp_path / "m.ckpt"
    path.write_bytes(raw)
    assert read_checkpoint(path).state_dict["a"].shape == (4,)
    path.write_bytes(change(raw))
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("front", "message"),
    [
        (as_legacy(GOOD, ("0",), version=1002), "unknown version"),
        (as_legacy(GOOD, ("0",), little=False), "big-endian"),
        (as_legacy(GOOD, ("0", "0")), "exactly the records"),
        (as_legacy(GOOD, ("1",)), "exactly the records"),
    ],
)
def test_legacy_headers_that_do_not_fit_are_refused(tmp_path: Path, front: bytes, message: str) -> None:
    record = (4).to_bytes(8, "little") + bytes(16)
    (tmp_path / "m.ckpt").write_bytes(front + 2 * record)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(tmp_path / "m.ckpt")


def test_a_legacy_storage_that_the_file_never_fills_is_refused(tmp_path: Path) -> None:
    """torch.load returns uninitialised memory here."""
    path = tmp_path / "m.ckpt"
    path.write_bytes(as_legacy(described({"a": Tensor((4,), (1,))})))
    with pytest.raises(CheckpointError, match="unfilled storage"):
        read_checkpoint(path)


def test_a_legacy_view_and_a_storage_of_two_types_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.ckpt"
    view = StorageId("storage", torch.FloatStorage, "0", "cpu", 4, ("1", 0, 4))
    path.write_bytes(as_legacy(described({"a": view})))
    with pytest.raises(CheckpointError, match="view of another record"):
        read_checkpoint(path)
    pair = [StorageId("storage", kind, "0", "cpu", 4) for kind in (torch.FloatStorage, torch.HalfStorage)]
    path.write_bytes(as_legacy(described(pair)))
    with pytest.raises(CheckpointError, match="two types or sizes"):
        read_checkpoint(path)


def test_a_zip_record_of_two_types_is_refused(tmp_path: Path) -> None:
    as_float, as_int = Tensor((4,), (1,)), Tensor((4,), (1,))
    as_int.arguments[0].pid = ("storage", torch.IntStorage, "0", "cpu", 4)
    with pytest.raises(CheckpointError, match="two types or sizes"):
        read_checkpoint(write_zip(tmp_path / "m.ckpt", described({"a": as_float, "b": as_int})))


@pytest.mark.parametrize("mmap", [True, False])
def test_a_zip_record_that_reaches_into_the_next_is_refused(tmp_path: Path, mmap: bool) -> None:
    """A longer extra field in the local header moves the data of the first record into the second."""
    records = {"data/0": bytes(16), "data/1": bytes(100)}
    path = write_zip(tmp_path / "m.ckpt", GOOD, records)
    read_checkpoint(path, mmap=mmap)
    whole = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        header = archive.getinfo("archive/data/0").header_offset
    whole[header + 28] = 40
    path.write_bytes(whole)
    with pytest.raises(CheckpointError, match="overlaps the next, 'archive/data/0'"):
        read_checkpoint(path, mmap=mmap)


@pytest.mark.parametrize("zip_format", [True, False], ids=["zip", "legacy"])
def test_a_lazily_negated_tensor_is_refused(tmp_path: Path, zip_format: bool) -> None:
    """Its record holds the numbers with the opposite sign."""
    negated = torch._neg_view(torch.arange(3.0))
    torch.save({"a": negated}, tmp_path / "m.ckpt", _use_new_zipfile_serialization=zip_format)
    with pytest.raises(CheckpointError, match="lazily negated"):
        read_checkpoint(tmp_path / "m.ckpt")
    torch.save({"a": negated.resolve_neg()}, tmp_path / "m.ckpt", _use_new_zipfile_serialization=zip_format)
    assert read_checkpoint(tmp_path / "m.ckpt").state_dict["a"].tolist() == [0, -1, -2]


CHILD = """
import json, resource, sys, time
import torch
from ldm.checkpoints.formats.read import read_checkpoint
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**30,) * 2)
for path in sys.argv[1:]:
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        read_checkpoint(path)
        reason = "accepted"
    except ValueError as error:
        reason = str(error)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(json.dumps([reason, grown, time.process_time() - start]))
"""


def _many_members(path: Path) -> Path:
    """A torch zip whose directory names 400,000 empty members that share one header."""
    name = b"%08x"
    entries = [
        b"PK\x01\x02" + bytes(24) + (8).to_bytes(2, "little") + bytes(16) + name % i for i in range(400_000)
    ]
    front, directory = b"PK\x03\x04" + bytes(60), b"".join(entries)
    counts = (len(entries).to_bytes(8, "little")) * 2
    place = len(directory).to_bytes(8, "little") + len(front).to_bytes(8, "little")
    end = b"PK\x06\x06" + (44).to_bytes(8, "little") + bytes(12) + counts + place
    locator = b"PK\x06\x07" + bytes(4) + (len(front) + len(directory)).to_bytes(8, "little") + bytes(4)
    path.write_bytes(front + directory + end + locator + b"PK\x05\x06" + bytes(4) + b"\xff" * 12 + bytes(2))
    return path


def _bombs(folder: Path) -> Iterator[tuple[Path, str]]:
    def pickled(name: str, data: bytes) -> Path:
        return write_zip(folder / name, b"\x80\x02" + data + b".")

    six_gib = b"\x8a\x05" + (6 * 2**30).to_bytes(5, "little")
    yield pickled("bytearray", call("builtins", "bytearray", six_gib)), "builtins.bytearray"
    zeros = write_zip(folder / "inflating", b"0" * 2**26, {}, compression=zipfile.ZIP_DEFLATED)
    yield zeros, "compressed member"
    yield write_zip(folder / "stride", described({"a": Tensor((10**6, 10**6), (0, 0))})), "does not fit"
    yield pickled("memo", b"Nr\xff\xff\xff\xff"), "found None"
    yield pickled("many", b"](" + b"}" * 1_100_000 + b"e"), "more than 1000000 instructions"
    yield pickled("tensors", b"](" + TENSOR + b"q\x01" + b"h\x01" * 10 + b"e"), "found list"
    function = named("torch._utils", "_rebuild_tensor_v2") + b"q\x01"
    arguments = b"(" + STORAGE_ID + b"K\x00K\x04\x85K\x01\x85\x89" + ORDERED_DICT + b"tq\x02"
    yield (
        pickled("crowd", b"](" + function + arguments + b"h\x01h\x02R" * 66_000 + b"e"),
        "more than 65536 tensors",
    )
    yield write_zip(folder / "long", b"N" * (2**26 + 1), {}), "data.pkl of more than 64 MB"
    laughs = b"]q\x00" + b"".join(
        b"](" + b"h" + bytes([n]) + b"h" + bytes([n]) + b"eq" + bytes([n + 1]) for n in range(99)
    )
    yield pickled("laughs", b"](" + laughs + b"e"), "found list"
    yield pickled("deep", b")" + b"\x85" * 200_000), "RecursionError"
    yield pickled("cycle", b"]q\x00h\x00a"), "contains itself"
    pairs = b")q\x00" + b"".join(b"h" + bytes([n]) + b"\x86q" + bytes([n + 1]) for n in range(60))
    yield pickled("import", laughs + text("name") + b"\x93"), "name is not text"
    hashed = folder / "hashed"
    front = as_legacy(GOOD)[: -len(pickle.dumps([], 2))]
    hashed.write_bytes(front + b"\x80\x02]" + pairs + b"a.")
    yield hashed, "not a list of names"
    header = folder / "header"
    header.write_bytes(b"\xff" * 7 + b"\x7f" + b"{" * 30)
    yield header, "safetensors header of"
    parts = folder / "parts"
    parts.write_bytes(safetensors_bytes(b'{"a":[' + b"[]," * 10_000_000 + b"[]]}"))
    yield parts, "more than 2000000 parts"
    yield _many_members(folder / "members"), "zip directory of more than 8 MB"
    levels = b"}q\x00" + b"".join(
        b"}(" + b"".join(text(str(i)) + b"h" + bytes([n]) for i in range(250)) + b"uq" + bytes([n + 1])
        for n in range(9)
    )
    yield pickled("mappings", b"](" + levels + b"e"), "found list"
    tree = b"}(" + text("levels") + b"](" + levels + b"e" + text("top") + b"h\x09u"
    yield pickled("tree", tree), "'levels' is not a tensor"
    yield (
        pickled("keys", b"}(" + b"".join(_equal_hashes(60_000)) + b"u"),
        "more than 8192 numbers as mapping keys",
    )
    few = b"}(" + b"".join(_equal_hashes(4_000)) + b"u"
    yield pickled("allowed keys", few), "is not a tensor"
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    many, wide = folder / "many tensors", folder / "wide"
    many.write_bytes(safetensors_bytes({f"layer.{i}.weight": empty for i in range(66_000)}))
    yield many, "more than 65536 tensors"
    wide.write_bytes(safetensors_bytes({"a": {**empty, "shape": [0, 2**62]}}))
    yield wide, "too many elements"


def _equal_hashes(count: int) -> Iterator[bytes]:
    """Whole numbers as keys whose hashes are all 0: multiples of 2^61 - 1."""
    for n in range(1, count + 1):
        number = (n * (2**61 - 1)).to_bytes(10, "little")
        yield b"\x8a\x0a" + number + b"N"


def _memo(indices: Iterable[int]) -> bytes:
    """A pickle of a list of numbers, each stored under a separate index of the memo and then read from it."""
    indices = list(indices)
    put = b"".join(
        b"J" + n.to_bytes(4, "little") + b"r" + i.to_bytes(4, "little") for n, i in enumerate(indices)
    )
    get = b"".join(b"j" + i.to_bytes(4, "little") for i in indices)
    return b"\x80\x02](" + put + get + b"e."


def test_any_index_of_the_memo_holds_its_own_value() -> None:
    """Against the reader in Python: the one in C has a table as long as the largest index."""
    indices = [0, 255, 256, 2**16, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1]
    data = _memo(indices)
    expected = pickle._Unpickler(io.BytesIO(data)).load()  # type: ignore[attr-defined]
    assert read_pickle(io.BytesIO(data)) == expected == [*range(8), *range(8)]
    wrong = b"\x80\x02Nr\x00\x00\x00\x80j\xff\xff\xff\xff."
    with pytest.raises(KeyError):
        read_pickle(io.BytesIO(wrong))


@pytest.mark.parametrize("step", [2**16, 2**12])
def test_indices_of_the_memo_that_share_their_low_bits_cost_no_more_than_others(step: int) -> None:
    """A table looks a number up by its low bits, and here they are all 0."""

    def seconds(indices: range) -> float:
        data = io.BytesIO(_memo(indices))
        start = time.process_time()
        read_pickle(data)
        return time.process_time() - start

    assert seconds(range(0, 40_000 * step, step)) < 3 * seconds(range(40_000)) + 0.1


@pytest.mark.long
def test_bombs_are_refused_quickly_and_in_little_memory(tmp_path: Path) -> None:
    bombs = list(_bombs(tmp_path))
    child = subprocess.run(
        [sys.executable, "-c", CHILD, *(str(path) for path, _ in bombs)],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
        cwd=ROOT,
    )
    reports = [json.loads(line) for line in child.stdout.splitlines()]
    assert len(reports) == len(bombs)
    for (path, message), (reason, grown_mb, seconds) in zip(bombs, reports, strict=True):
        assert message in reason, (path.name, reason)
        assert seconds < 5, (path.name, seconds)  # of the CPU: other programs may slow the clock
        assert grown_mb < (200 if path.name in ("many", "many tensors") else 50), (
            path.name,
            grown_mb,
        )
