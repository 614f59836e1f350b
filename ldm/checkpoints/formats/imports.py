"""Lists what the pickles in a file ask to import, of files that the reader refuses too; nothing is run."""

from __future__ import annotations

import io
import pickletools
from collections.abc import Iterator
from typing import BinaryIO

from ldm.checkpoints.formats.detect import ZIP_START
from ldm.checkpoints.formats.pickle_reader import MAX_INSTRUCTIONS, MAX_PICKLE_BYTES
from ldm.checkpoints.formats.torch_zip import open_zip

_PICKLE_START = b"\x80"  # of protocol 2 and later
_PUTS = frozenset({"PUT", "BINPUT", "LONG_BINPUT"})
_GETS = frozenset({"GET", "BINGET", "LONG_BINGET"})
_MAX_PICKLES = 64
_MAX_NAMES = 1000


def imports_of(file: BinaryIO) -> tuple[str, ...]:
    """The dotted names that the pickles of an open file ask for, each once, in the order of their first use.

    Pickles are looked for in every `.pkl` member of a zip archive, and in a row from the start of another file.
    Damage ends the list early. A program made to confuse can hide the names of protocol 4 after other
    instructions: those are listed as "?".
    """
    names: dict[str, None] = {}
    for stream in _pickles(file):
        for name in _names(stream):
            names.setdefault(name)
            if len(names) >= _MAX_NAMES:
                return tuple(names)
    return tuple(names)


def _pickles(file: BinaryIO) -> Iterator[BinaryIO]:
    file.seek(0)
    start = file.read(len(ZIP_START))
    if start == ZIP_START:
        yield from _zipped(file)
    elif start.startswith(_PICKLE_START):
        file.seek(0)
        stream = io.BytesIO(file.read(MAX_PICKLE_BYTES))
        for _ in range(_MAX_PICKLES):
            before = stream.tell()
            if stream.read(1) != _PICKLE_START:
                return
            stream.seek(before)
            yield stream


def _zipped(file: BinaryIO) -> Iterator[BinaryIO]:
    """The pickles of an archive; of a damaged one, whatever looks like a pickle near its start."""
    try:
        with open_zip(file) as archive:
            members = [member for member in archive.infolist() if member.filename.endswith(".pkl")]
            for member in members[:_MAX_PICKLES]:
                with archive.open(member) as content:
                    yield io.BytesIO(content.read(MAX_PICKLE_BYTES))
    except Exception:  # noqa: BLE001 - zipfile raises many kinds for files made to confuse it
        file.seek(0)
        head = file.read(MAX_PICKLE_BYTES)
        for protocol in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
            if (start := head.find(protocol)) >= 0:
                yield io.BytesIO(head[start:])


def _names(stream: BinaryIO) -> Iterator[str]:
    """The names that one pickle asks for; the stream is left at the end of the pickle."""
    memo: dict[str, str] = {}  # by text, whose hashes a file cannot make equal
    texts: list[str] = []  # the last two that were pushed
    last = "?"  # what the instruction before pushed, if it was text
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if count > MAX_INSTRUCTIONS:
                return
            pushed = "?"
            if opcode.name in ("GLOBAL", "INST"):
                yield str(argument).replace(" ", ".")
            elif opcode.name == "STACK_GLOBAL":
                yield ".".join([*["?", "?"], *texts][-2:])
            elif opcode.name.startswith("EXT"):
                yield f"?.extension {argument}"
            elif opcode.name == "MEMOIZE":
                memo[str(len(memo))] = pushed = last
            elif opcode.name in _PUTS:
                memo[str(argument or 0)] = pushed = last
            elif opcode.name in _GETS:
                pushed = memo.get(str(argument or 0), "?")
                texts = [*texts[-1:], pushed]
            elif isinstance(argument, str):
                pushed = argument
                texts = [*texts[-1:], pushed]
            last = pushed
    except Exception:  # noqa: BLE001 - pickletools raises many kinds for damage, which ends the list
        return
