"""Detects the format of a checkpoint file by its bytes, not its name. Without torch, so a wrong path fails fast."""

from __future__ import annotations

import os
import re
from contextlib import AbstractContextManager
from typing import BinaryIO, Literal

from ldm import files
from ldm.util import InputError

Format = Literal["torch zip", "torch legacy", "safetensors", "gguf"]

ZIP_START = b"PK\x03\x04"
# The number 0x1950a86a20f9469cfc6c, pickled: the first of the five pickles of the format before torch 1.6.
GGUF_START = b"GGUF"
LEGACY_START = bytes.fromhex("80028a0a6cfc9c46f9206aa85019")
MAX_SAFETENSORS_HEADER = 100_000_000

_HEAD_BYTES = 4096
_SHORTEST = 16

# (offset, signature, what it is): formats that are recognised only to be named.
_FOREIGN = (
    (0, b"PK\x05\x06", "an empty zip archive"),
    (0, b"\x1f\x8b", "a gzip archive; unpack it first"),
    (0, b"BZh", "a bzip2 archive; unpack it first"),
    (0, b"\xfd7zXZ\x00", "an xz archive; unpack it first"),
    (0, b"\x28\xb5\x2f\xfd", "a zstd archive; unpack it first"),
    (0, b"Rar!", "a rar archive; unpack it first"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive; unpack it first"),
    (257, b"ustar", "a tar archive; unpack it first (torch.save of before 2017 wrote tar: save it again)"),
    (0, b"\x89HDF", "an HDF5 file; this toolkit reads .ckpt, .safetensors and .gguf"),
    (0, b"\x89PNG", "a PNG image"),
    (0, b"\xff\xd8\xff", "a JPEG image"),
)


class CheckpointError(InputError):
    """A checkpoint file cannot be used: one line names the file, the reason and the cure."""


def reading(path: str | os.PathLike[str]) -> AbstractContextManager[None]:
    """Turns any exception raised inside into a `CheckpointError` of one line that begins with the path."""
    return files.guarded(path, _damage, CheckpointError)


def _damage(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"cannot be read: {error}"
    return f"is damaged or incomplete ({type(error).__name__}: {error}); download it again"


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """`ldm.files.open_regular` for files of weights, which are never empty."""
    file = files.open_regular(path)
    if file_size(file):
        return file
    file.close()
    raise CheckpointError("is empty (0 bytes); download it again")


def file_size(file: BinaryIO) -> int:
    """Size of an open file in bytes."""
    return os.fstat(file.fileno()).st_size


def sniff(file: BinaryIO) -> Format:
    """The kind of an open checkpoint file, from its first bytes; any other content is named and refused."""
    file.seek(0)
    head = file.read(_HEAD_BYTES)
    if len(head) < _SHORTEST:
        raise CheckpointError(f"is incomplete: it has only {len(head)} bytes; download it again")
    if head.startswith(ZIP_START):
        return "torch zip"
    if head.startswith(LEGACY_START):
        return "torch legacy"
    if head.startswith(GGUF_START):
        return "gguf"
    length = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and 2 <= length <= MAX_SAFETENSORS_HEADER:  # a length may look like another format
        return "safetensors"
    _refuse_known_content(head)
    if head[8:9] == b"{":
        return "safetensors"
    raise CheckpointError(
        f"is not a checkpoint: unknown format (starts with {head[:8].hex(' ')}); "
        "this toolkit reads .ckpt, .safetensors and .gguf"
    )


def _refuse_known_content(head: bytes) -> None:
    if not any(head):
        raise CheckpointError("holds only zero bytes at its start (interrupted download); download it again")
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise CheckpointError("is a web page, not a checkpoint (login or licence page?); download it again")
    if head.startswith(b"version https://git-lfs"):
        size = re.search(rb"^size (\d{1,20})\s*$", head, re.MULTILINE)
        whole = f" (the real file has {int(size[1]):,} bytes)" if size else ""
        raise CheckpointError(f"is a git-lfs pointer{whole}; run: git lfs pull")
    for offset, signature, name in _FOREIGN:
        if head.startswith(signature, offset):
            raise CheckpointError(f"is {name}")
    if head[0] == 0x80 and 2 <= head[1] <= 5:
        raise CheckpointError("is a pickle, but not one that torch.save wrote; it was not read")
    if head[0] == 0x08 and head[2] == 0x12:  # protobuf: ir_version, then producer_name
        raise CheckpointError("is an onnx file; this toolkit reads .ckpt, .safetensors and .gguf")
