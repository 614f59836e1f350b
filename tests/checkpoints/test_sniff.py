"""A file that is not a checkpoint is identified in one line, whatever its name."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

from ldm.checkpoints.formats.detect import CheckpointError, reading
from ldm.checkpoints.formats.read import read_checkpoint
from ldm.util import InputError
from tests.support.paths import ROOT

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:fe4e\nsize 4265380512\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"is empty \(0 bytes\)"),
        (bytes(2**20), "only zero bytes"),
        (b"\n  <!DOCTYPE html><html><body>log in</body>", "is a web page"),
        (b"\xef\xbb\xbf<HTML><head></head></HTML>", "is a web page"),
        (POINTER, r"git-lfs pointer \(the real file has 4,265,380,512 bytes\); run: git lfs pull"),
        (b"\x1f\x8b" + bytes(50), "gzip"),
        (bytes(257 - 3).replace(b"\0", b"n") + b"abcustar\x0000" + bytes(300), "tar archive"),
        (b"Rar!\x1a\x07\x00" + bytes(50), "rar"),
        (b"7z\xbc\xaf\x27\x1c" + bytes(50), "7z"),
        (b"GGUF\x03\x00\x00\x00" + bytes(50), "holds no tensors"),
        (b"\x08\x07\x12\x07pytorch" + bytes(50), "onnx"),
        (b"\x89HDF\r\n\x1a\n" + bytes(50), "HDF5"),
        (b"\x89PNG\r\n\x1a\n" + bytes(50), "PNG image"),
        (b"PK\x05\x06" + bytes(18), "empty zip"),
        (b"\x80\x04\x95" + bytes(50), "a pickle, but not one that torch.save wrote"),
        (b"just some text that a user took for a model", r"unknown format \(starts with 6a 75 73 74"),
        (b"PK", "only 2 bytes"),
    ],
)
@pytest.mark.parametrize("name", ["model.ckpt", "model.safetensors"])
def test_other_content_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as error:
        read_checkpoint(tmp_path / name)
    assert isinstance(error.value, InputError) and str(error.value).isprintable()


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_a_file_cut_anywhere_is_incomplete(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model.ckpt"
    tensors = {"a": torch.ones(100), "b": torch.zeros(7)}
    if kind == "safetensors":
        safetensors.torch.save_file(tensors, path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=kind == "zip")
    whole = path.read_bytes()
    for length in (1, 15, 16, 100, len(whole) // 2, len(whole) - 40, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"incomplete"):
            read_checkpoint(path)


def test_content_decides_and_not_the_name(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(5.0)}
    torch.save(tensors, tmp_path / "pickle.safetensors")
    safetensors.torch.save_file(tensors, tmp_path / "safe.ckpt")
    assert read_checkpoint(tmp_path / "pickle.safetensors").format == "torch zip"
    assert read_checkpoint(tmp_path / "safe.ckpt").format == "safetensors"
    assert torch.equal(read_checkpoint(tmp_path / "safe.ckpt").state_dict["a"], tensors["a"])


@pytest.mark.filterwarnings("ignore")
def test_a_torchscript_archive_is_refused(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), str(tmp_path / "m.ckpt"))
    with pytest.raises(CheckpointError, match="TorchScript"):
        read_checkpoint(tmp_path / "m.ckpt")


def test_paths_that_are_no_regular_files_are_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    start = time.process_time()
    for path, message in [
        ("none.ckpt", "no such file"),
        ("folder", "is a folder, and a single file is needed"),
        ("loop", "cannot be read: Too many levels of symbolic links"),
        ("pipe", "is a pipe, socket or device"),
        ("/dev/zero", "is a pipe, socket or device"),
        ("nul\0byte", "null"),
        ("x" * 300, "File name too long"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            read_checkpoint(tmp_path / path)
    assert time.process_time() - start < 1


def test_a_file_without_permission_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    torch.save({"a": torch.ones(1)}, tmp_path / "m.ckpt")
    monkeypatch.setattr("builtins.open", denied)
    with pytest.raises(CheckpointError, match=r"m\.ckpt: cannot be read: Permission denied"):
        read_checkpoint(tmp_path / "m.ckpt")


def test_a_wrong_path_is_found_before_torch_is_imported() -> None:
    code = (
        "import sys\n"
        "from ldm.checkpoints.formats.detect import CheckpointError, open_regular, reading\n"
        "try:\n"
        "    with reading('none.ckpt'): open_regular('none.ckpt')\n"
        "except CheckpointError as error: print(error, 'torch' in sys.modules)\n"
    )
    child = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert child.stdout == "none.ckpt: no such file; check the path False\n"


@pytest.mark.parametrize("length", [640, 0x0580, 0x120708])
def test_a_safetensors_header_length_that_looks_like_another_format_is_read(
    tmp_path: Path, length: int
) -> None:
    """The length comes first in the file: as bytes these are 80 02 and 80 05 (pickle) and 08 07 12 (ONNX)."""
    plain = safetensors.torch.save({"a": torch.arange(3.0)})
    data = plain[8 + int.from_bytes(plain[:8], "little") :]
    header = plain[8 : len(plain) - len(data)].ljust(length)
    path = tmp_path / "m.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + header + data)
    assert torch.equal(safetensors.torch.load_file(path)["a"], torch.arange(3.0))
    assert read_checkpoint(path).state_dict["a"].tolist() == [0, 1, 2]


def test_a_lack_of_memory_is_no_damage() -> None:
    with pytest.raises(CheckpointError, match=r"^m\.ckpt: does not fit into memory$"), reading("m.ckpt"):
        raise MemoryError
