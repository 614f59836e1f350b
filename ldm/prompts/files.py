"""Reads prompt files as lines of text, and collects the faults of a file in one error."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Generator, Iterator
from operator import itemgetter
from pathlib import Path

from ldm.util import InputError, printable

MAX_LINE = 10_000
MAX_DOCUMENT = 16_000_000  # of a line that begins with a bracket: JSON can be one line
STDIN = "-"
_SHOWN_FAULTS = 20
_MOST_FAULTS = 1_000  # a file with more is not a prompt file: the rest of it is not read


class Faults:
    """The faults of one source, reported together; a source without a name is one line, without a number.

    The lines are counted from `first`.
    """

    def __init__(self, name: str = "", first: int = 1) -> None:
        self.name, self._first = name, first
        self._shown: list[tuple[int, str]] = []
        self._count = 0

    def add(self, number: int, what: str) -> None:
        """Adds a fault of line `number`; raises once there are a thousand."""
        self._count += 1
        if self._count <= _SHOWN_FAULTS:
            self._shown.append((number, what))
        if self._count == _MOST_FAULTS:
            self.raise_any()

    def raise_any(self) -> None:
        """Raises `InputError` with a line for each of twenty faults at most, and a count of the others."""
        if not self._shown:
            return
        told = [
            f"{self.name}, line {number + self._first - 1}: {what}" if self.name else what
            for number, what in sorted(self._shown, key=itemgetter(0))
        ]
        more = self._count - len(told)
        raise InputError("\n".join([*told, f"and {more} more"] if more else told))


def source_name(source: str | Path | bytes) -> str:
    """Returns the name of a prompt file in messages."""
    return "standard input" if source == STDIN or isinstance(source, bytes) else printable(source)


def no_prompt(name: str) -> InputError:
    """Returns the error for a source without a prompt."""
    return InputError(f"{name} holds no prompt: write one a line")


def read_lines(source: str | Path | bytes, faults: Faults) -> Iterator[str]:
    """Yields every line of a file, of standard input for "-", or of bytes, holding one line at a time.

    Lines are UTF-8, with or without a byte order mark, and end in LF, CRLF or CR; every other separator
    (form feed, U+2028, ...) is part of the text. A line of more than 10,000 characters (16 million where the
    first line begins with [ or {) or with bytes that are not UTF-8 is added to `faults` and yielded empty.
    `InputError` for a file that cannot be read.
    """
    try:
        with _open(source) as file:
            yield from _checked_lines(file, faults)
    except OSError as error:
        raise InputError(f"cannot read the prompt file {faults.name}: {error.strerror or error}") from None


@contextlib.contextmanager
def _open(source: str | Path | bytes) -> Generator[io.TextIOWrapper]:
    """Opens the source as text; bytes that are not UTF-8 become lone surrogates, so that their position is known."""
    if isinstance(source, bytes):
        yield io.TextIOWrapper(io.BytesIO(source), encoding="utf-8", errors="surrogateescape", newline="")
        return
    if source != STDIN:
        with open(source, encoding="utf-8", errors="surrogateescape", newline="") as file:
            yield file
        return
    if sys.stdin is None:
        raise InputError("--from-file - reads standard input, but it is closed; give a file")
    file = io.TextIOWrapper(sys.stdin.buffer, encoding="utf-8", errors="surrogateescape", newline="")
    try:
        yield file
    finally:
        file.detach()  # standard input stays open


def _checked_lines(file: io.TextIOWrapper, faults: Faults) -> Iterator[str]:
    number, offset, after_cr, limit = 0, 0, False, 0
    while raw := file.readline((limit or MAX_LINE) + len("\r\n")):
        if not limit and raw.removeprefix("\ufeff").strip():
            if encoding := _foreign_encoding(raw):
                faults.add(number + 1, f"is not UTF-8 but {encoding}; save the file as UTF-8")
                return
            limit = MAX_DOCUMENT if raw.removeprefix("\ufeff").lstrip().startswith(("[", "{")) else MAX_LINE
            if limit > MAX_LINE and not raw.endswith(("\n", "\r")):
                raw += file.readline(limit + len("\r\n") - len(raw))
        size = _size(raw)
        if after_cr and raw == "\n":  # the second half of a CRLF that a limit of `readline` cut
            after_cr, offset = False, offset + size
            continue
        number += 1
        text = raw.removesuffix("\n").removesuffix("\r").removeprefix("\ufeff" if number == 1 else "")
        fault = _foreign_byte(raw, offset)
        if len(text) > (limit or MAX_LINE):
            fault = fault or too_long(limit or MAX_LINE)
            while raw and not raw.endswith(("\n", "\r")):
                raw = file.readline(1 << 16)
                size += _size(raw)
        if fault:
            faults.add(number, fault)
        after_cr, offset = raw.endswith("\r"), offset + size
        yield "" if fault else text


def too_long(limit: int = MAX_LINE) -> str:
    """Returns the fault of a line or a prompt of more characters."""
    return f"longer than {limit:,} characters; shorten it"


def _foreign_encoding(first: str) -> str:
    """Returns a file's encoding if it is UTF-16 or UTF-32, by the mark or the zeros of its first line."""
    head = first[:64].encode("utf-8", "surrogateescape").rstrip(b"\r\n")
    if head.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        return "UTF-32"
    zeros = sorted(half.count(0) / len(half) for half in (head[::2], head[1::2]) if len(half) > 1)
    marked = head.startswith((b"\xff\xfe", b"\xfe\xff"))
    return "UTF-16" if marked or (len(zeros) == 2 and zeros[0] == 0 and zeros[1] > 0.8) else ""


def _size(raw: str) -> int:
    return len(raw) if raw.isascii() else len(raw.encode(errors="surrogateescape"))


def _foreign_byte(raw: str, offset: int) -> str:
    """Returns the fault of the first byte that is not UTF-8 in `raw`, which starts `offset` bytes into the file."""
    try:
        raw.encode()
    except UnicodeEncodeError as error:
        position = offset + len(raw[: error.start].encode())
        byte = ord(raw[error.start]) & 0xFF
        windows = bytes([byte]).decode("cp1252", "replace")
        hint = f" ({windows} in Windows-1252)" if windows.isalpha() or windows in "‘’“”–—…€°" else ""
        return f"byte 0x{byte:02x} at offset {position} is not UTF-8{hint}; save the file as UTF-8"
    return ""
