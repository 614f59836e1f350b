"""Reads the zip format of `torch.save` (torch 1.6 and later) without running anything from the file."""

from __future__ import annotations

import io
import itertools
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO

import torch

from ldm.checkpoints.formats.detect import ZIP_START, CheckpointError
from ldm.checkpoints.formats.pickle_reader import MAX_PICKLE_BYTES, build_tree, read_pickle
from ldm.checkpoints.formats.tensor_bytes import FileBytes, TensorSpec

_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, ..., length of the name, length of the extra field
_END = struct.Struct("<4s8xIIH")  # signature, ..., size and start of the directory, length of the comment
_LOCATOR = struct.Struct("<4s4xQ4x")  # signature, ..., start of the large end record
_LARGE_END = struct.Struct("<4s36xQQ")  # signature, ..., size and start of the directory
_MAX_READ = 8 * 2**20  # a v1 training checkpoint with EMA and optimizer has a directory of about 0.4 MB
_UTF8_NAME = 0x800
_ENCRYPTED = 0x1 | 0x40 | 0x2000


def read_torch_zip(file: BinaryIO, use_mmap: bool) -> Any:
    """The content of the file: dicts, lists, tuples, numbers, text and CPU tensors.

    Call it inside `reading`. With `use_mmap` the tensors are views on one private map of the file.
    """
    with open_zip(file) as archive:
        records = _checked_records(archive)
        content = FileBytes(file, use_mmap)
        starts = _data_starts(content, archive)
        described = read_pickle(io.BytesIO(_pickle_bytes(content, records["data.pkl"], starts)))
        return build_tree(described, _tensor_maker(content, records, starts))


def _pickle_bytes(content: FileBytes, record: zipfile.ZipInfo, starts: dict[str, int]) -> memoryview:
    data = content.read(starts[record.filename], record.file_size)
    if zlib.crc32(data) != record.CRC:
        raise CheckpointError("is damaged: its data.pkl does not match its checksum (CRC); download it again")
    return data


def damaged_records(file: BinaryIO) -> list[str]:
    """The names of all records whose bytes do not match their CRC. Reads the whole file."""
    damaged: list[str] = []
    with open_zip(file) as archive:
        for record in _checked_records(archive).values():
            try:
                with archive.open(record) as content:
                    while content.read(2**20):
                        pass
            except zipfile.BadZipFile:
                damaged.append(record.filename)
    return damaged


class _ShortReads:
    """A file for `zipfile`, which reads the whole directory in one piece: a piece may have 8 MB at most."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, size: int = -1) -> bytes:
        if size > _MAX_READ:
            raise CheckpointError(f"has a zip directory of more than {_MAX_READ // 2**20} MB; refused")
        return self._file.read(size)


def open_zip(file: BinaryIO) -> zipfile.ZipFile:
    """A zip archive, its directory read and bounded in size; `CheckpointError` without one."""
    try:
        return zipfile.ZipFile(_ShortReads(file))  # type: ignore[arg-type]  # it needs no more of a file
    except zipfile.BadZipFile:
        raise CheckpointError("is incomplete: no zip directory at its end; download it again") from None


def _checked_records(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The members by their names below the one top folder, after checks on the directory as a whole."""
    members = [member for member in archive.infolist() if not member.is_dir()]
    pickles = [m.filename for m in members if m.filename.count("/") == 1 and m.filename.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise CheckpointError(
            f"is a zip archive with {len(pickles)} data.pkl, so not one checkpoint of torch.save"
        )
    top = pickles[0].removesuffix("data.pkl")
    records = {member.filename.removeprefix(top): member for member in members}
    if len({member.filename for member in members}) != len(members):
        raise CheckpointError("is a zip archive that has the same member twice; refused")
    if "constants.pkl" in records or any(name.startswith("code/") for name in records):
        raise CheckpointError("is a TorchScript archive (a program); save the model's state_dict instead")
    for member in members:
        _check_member(member, top)
    if records["data.pkl"].file_size > MAX_PICKLE_BYTES:
        raise CheckpointError(f"has a data.pkl of more than {MAX_PICKLE_BYTES // 2**20} MB; refused")
    if sum(member.file_size for member in members) > archive.start_dir:
        raise CheckpointError("claims to hold more bytes than the file has; refused")
    if "byteorder" in records:
        with archive.open(records["byteorder"]) as order:
            if order.read(8) != b"little":
                raise CheckpointError("was saved on a big-endian machine; save it again as safetensors")
    return records


def _check_member(member: zipfile.ZipInfo, top: str) -> None:
    if not member.filename.startswith(top):
        raise CheckpointError(f"has {member.filename[:100]!r} outside of its folder {top[:100]!r}; refused")
    if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
        raise CheckpointError(f"has a compressed member, {member.filename[:100]!r}; store it uncompressed")
    if member.flag_bits & _ENCRYPTED:
        raise CheckpointError(f"has an encrypted member, {member.filename[:100]!r}; refused")


def _tensor_maker(
    content: FileBytes, records: dict[str, zipfile.ZipInfo], starts: dict[str, int]
) -> Callable[[TensorSpec], torch.Tensor]:
    storages: dict[str, torch.Tensor] = {}

    def make(spec: TensorSpec) -> torch.Tensor:
        storage = spec.storage
        if storage.key not in storages:
            record = records.get(f"data/{storage.key}")
            declared = storage.count * storage.dtype.itemsize
            if record is None or record.file_size != declared:
                there = "no such record" if record is None else f"a record of {record.file_size} bytes"
                raise CheckpointError(f"needs {declared} bytes, but the file has {there}")
            start = starts[record.filename]
            storages[storage.key] = content.tensor(start, storage.count, storage.dtype)
        return spec.view(storages[storage.key])

    return make


def _data_starts(content: FileBytes, archive: zipfile.ZipFile) -> dict[str, int]:
    """Where the bytes of each member begin, by its full name, checked to end before the next member begins."""
    _check_end(content, archive.start_dir)
    members = archive.infolist()
    starts = {member.filename: _data_start(content, member) for member in members}
    headers = sorted(member.header_offset for member in members)
    if headers[0] != 0:
        raise CheckpointError("has bytes in front of its first zip member; refused")
    limits = dict(itertools.pairwise([*headers, archive.start_dir]))
    for member in members:
        if starts[member.filename] + member.file_size > limits[member.header_offset]:
            raise CheckpointError(f"has a member that overlaps the next, {member.filename[:100]!r}; refused")
    return starts


def _check_end(content: FileBytes, start_dir: int) -> None:
    """Raises `CheckpointError` unless the file ends with the archive, whose end record gives its start.

    Otherwise `zipfile`, which puts up with bytes in front, and torch could see two archives in one file.
    """
    end = content.size - _END.size
    signature, _, start, comment = _END.unpack(content.read(end, _END.size))
    mark, large_end = _LOCATOR.unpack(content.read(end - _LOCATOR.size, _LOCATOR.size))
    if mark == b"PK\x06\x07":
        end -= _LOCATOR.size + _LARGE_END.size
        _, _, start = _LARGE_END.unpack(content.read(end, _LARGE_END.size))
    else:
        large_end = end
    if signature != b"PK\x05\x06" or comment or start != start_dir or large_end != end:
        raise CheckpointError("has bytes before or after its zip archive; refused")


def _data_start(content: FileBytes, record: zipfile.ZipInfo) -> int:
    """Where the bytes of a record begin: torch pads the *local* header, which the directory does not know."""
    header = content.read(record.header_offset, _LOCAL_HEADER.size)
    signature, name_length, extra_length = _LOCAL_HEADER.unpack(header)
    if signature != ZIP_START:
        raise CheckpointError("has no header where the zip directory places it")
    name_start = record.header_offset + _LOCAL_HEADER.size
    name = record.filename.encode("utf-8" if record.flag_bits & _UTF8_NAME else "cp437")
    if bytes(content.read(name_start, name_length)) != name:
        raise CheckpointError(f"has another name for {record.filename[:100]!r} in its header; refused")
    return name_start + name_length + extra_length
