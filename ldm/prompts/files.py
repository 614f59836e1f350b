"""Prompt files: one prompt a line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ldm.util import InputError, printable

MAX_LINE = 10_000


def read_prompt_file(path: str | Path) -> list[str]:
    """The prompts of a file, every line checked; see `prompt_lines` for the format and the errors."""
    return [text for _, text in prompt_lines(path)]


def prompt_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """Yields line number (from 1) and text of each line that is not blank, holding one line at a time.

    Lines are UTF-8, with or without a byte order mark, and end in LF, CRLF or CR; every other separator
    (form feed, U+2028, ...) is part of the prompt. `InputError` for a file that cannot be read or holds no
    prompt, for a line of more than 10,000 characters, and for bytes that are not UTF-8.
    """
    name = printable(path)
    blank = True
    try:
        # Bytes that are not UTF-8 come out as lone surrogates, so that the line and the offset are known.
        with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
            number, offset = 0, 0
            while raw := file.readline(MAX_LINE + len("\r\n")):
                number += 1
                _check_utf8(raw, f"{name}, line {number}", offset)
                offset += len(raw.encode())
                text = raw.removesuffix("\n").removesuffix("\r").removeprefix("\ufeff" if number == 1 else "")
                if len(text) > MAX_LINE:
                    raise InputError(
                        f"{name}, line {number}: longer than {MAX_LINE:,} characters; shorten it"
                    )
                if text.strip():
                    blank = False
                    yield number, text
    except OSError as error:
        raise InputError(f"cannot read the prompt file {name}: {error.strerror}") from None
    if blank:
        raise InputError(f"the prompt file {name} holds no prompt: write one a line")


def _check_utf8(raw: str, place: str, offset: int) -> None:
    """Raises if `raw`, which starts `offset` bytes into the file, holds an escaped byte."""
    try:
        raw.encode()
    except UnicodeEncodeError as error:
        position = offset + len(raw[: error.start].encode())
        byte = ord(raw[error.start]) & 0xFF
        raise InputError(
            f"{place}: byte 0x{byte:02x} at offset {position} is not UTF-8; save the file as UTF-8"
        ) from None
