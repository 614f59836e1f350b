"""Textual inversions inside PNG files, as AUTOMATIC1111's web UI shares them: JSON in a text of the image."""

from __future__ import annotations

import base64
import binascii
import json
import zlib
from typing import Any, BinaryIO

import torch

from ldm.checkpoints.formats.detect import CheckpointError, file_size
from ldm.checkpoints.formats.tensor_bytes import Tree

KEYWORD = b"sd-ti-embedding"
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_TENSOR = "TORCHTENSOR"
_MOST_BYTES = 16 * 2**20  # of text; 75 vectors take 2 MB
_MOST_CHUNKS = 100_000


def is_png(file: BinaryIO) -> bool:
    """Whether an open file begins as a PNG does."""
    file.seek(0)
    return file.read(len(_SIGNATURE)) == _SIGNATURE


def holds_embedding(file: BinaryIO) -> bool:
    """Whether the texts of an open PNG file include a textual inversion. Call it inside `reading`."""
    return _find(file) is not None


def read_png_embedding(file: BinaryIO) -> dict[Any, Tree]:
    """The textual inversion of an open PNG file: names, numbers, and CPU tensors in float32.

    Only numbers, text, lists and mappings can come of it. Call it inside `reading`. A PNG without one is a
    `CheckpointError`: the web UI also hides it in the pixels, and that copy is not read.
    """
    found = _find(file)
    if found is None:
        raise CheckpointError(
            f"is a PNG image without a textual inversion in its texts ({KEYWORD.decode()}); one that is only "
            "hidden in the pixels is not read: use its .pt file"
        )
    try:
        tree: Tree = json.loads(base64.b64decode(_text(*found), validate=True), object_hook=_tensors)
    except (binascii.Error, ValueError, RecursionError) as error:
        raise CheckpointError(f"holds a textual inversion that is damaged: {error}") from None
    if not isinstance(tree, dict):
        raise CheckpointError("holds a textual inversion that is not a mapping")
    return tree


def _find(file: BinaryIO) -> tuple[bytes, bytes] | None:
    """The kind and the content of the chunk of text under the keyword; the chunks of pixels are passed over."""
    size, position = file_size(file), len(_SIGNATURE)
    for _ in range(_MOST_CHUNKS):
        file.seek(position)
        head = file.read(8)
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        if len(head) < 8 or position + 12 + length > size:
            return None
        if kind in (b"tEXt", b"zTXt", b"iTXt") and file.read(len(KEYWORD) + 1) == KEYWORD + b"\0":
            return kind, _content(file, position + 8, length, kind)
        position += 12 + length
    return None


def _content(file: BinaryIO, start: int, length: int, kind: bytes) -> bytes:
    if length > _MOST_BYTES:
        raise CheckpointError(f"holds a text of {length} bytes under {KEYWORD.decode()}; refused")
    file.seek(start)
    data = file.read(length)
    if zlib.crc32(kind + data) != int.from_bytes(file.read(4), "big"):
        raise CheckpointError("is damaged: the checksum of its textual inversion differs; download it again")
    return data[len(KEYWORD) + 1 :]


def _text(kind: bytes, data: bytes) -> bytes:
    """The text itself, unpacked if it is packed."""
    packed = kind == b"zTXt"
    if kind == b"iTXt":
        packed, data = data[:1] == b"\1", data[2:].split(b"\0", 2)[-1]
    elif packed:
        data = data[1:]
    if not packed:
        return data
    unpacker = zlib.decompressobj()
    try:
        text = unpacker.decompress(data, _MOST_BYTES)
    except zlib.error as error:
        raise CheckpointError(f"holds a textual inversion that cannot be unpacked: {error}") from None
    if unpacker.unconsumed_tail:
        raise CheckpointError(f"holds a textual inversion of more than {_MOST_BYTES} bytes; refused")
    return text


def _tensors(entry: dict[str, Tree]) -> Tree:
    """A mapping of JSON, or the tensor that it describes."""
    if _TENSOR not in entry:
        return entry
    try:
        return torch.tensor(entry[_TENSOR], dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{_TENSOR} is not an array of numbers ({error})") from None
