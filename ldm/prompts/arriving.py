"""Standard input while it is open: its lines as they arrive."""

from __future__ import annotations

import contextlib
import io
import os
import select
import stat
import sys
from collections.abc import Iterator

_CHUNK = 1 << 16
PATIENCE = 0.2  # seconds within which the rest of a list follows its first line


class ArrivingLines:
    """The lines of an open descriptor, each once it is complete; iteration ends with the input."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._data = b""
        self._ended = False

    @property
    def first(self) -> bytes:
        """The first of the lines that have arrived and are not blank; empty if there is none."""
        whole = (line.strip() for line in self._data.split(b"\n")[:-1])
        return next(filter(None, whole), b"")

    def whole(self, patience: float | None = PATIENCE) -> bytes | None:
        """Waits for a first line; returns everything if the input ends then, or while more of it arrives, else None.

        Within `patience` seconds (None: however long it takes) more has to come, or the end. Nothing is lost: the
        lines are yielded in any case.
        """
        while not self._ended:
            if self._has_line() and not select.select([self._descriptor], [], [], patience)[0]:
                return None
            self._read()
        return self._data

    def __iter__(self) -> Iterator[bytes]:
        while True:
            while not self._ended and not self._has_line():
                self._read()
            if not self._data:
                return
            line, end, self._data = self._data.partition(b"\n")
            yield line + end

    def _has_line(self) -> bool:
        return b"\n" in self._data

    def _read(self) -> None:
        more = os.read(self._descriptor, _CHUNK)
        self._data += more
        self._ended = not more


def arriving_lines() -> ArrivingLines | None:
    """Returns the lines of standard input if they can arrive one by one: from a terminal, a pipe or a socket."""
    if os.name == "nt" or sys.stdin is None:  # Windows cannot wait for a pipe
        return None
    with contextlib.suppress(OSError, ValueError, AttributeError, io.UnsupportedOperation):
        descriptor = sys.stdin.fileno()
        return None if stat.S_ISREG(os.fstat(descriptor).st_mode) else ArrivingLines(descriptor)
    return None
