"""Writes images: a file is written completely or not at all, and existing files are never overwritten."""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import re
from pathlib import Path
from types import TracebackType
from typing import Literal

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm.files import open_regular, part_beside, sweep_and_stay, written_whole
from ldm.images.keywords import INFOTEXT_KEYWORD, RECORD_KEYWORD
from ldm.util import InputError, printable

logger = logging.getLogger(__name__)

Kind = Literal["sample", "grid", "sheet"]

MAX_TEXT_BYTES = 64 * 1024
COMPRESS_LEVEL = 4  # of zlib; 6, its default, makes files 0 to 4 % smaller in up to 2.4 times the time
_UNFINISHED = "ldm-unfinished"
# the result of `part_beside` for the files of a run
_OWN_PART = re.compile(
    r"\.([0-9]{5,}\.png|(grid|sheet)-[0-9]{4,}\.png|run-[0-9]{5,}\.json|gallery\.html|probe)\.[0-9a-f]{8}\.part"
)
_TEXT_START, _HEAD_BYTES = 37, 512  # after the signature, the chunk IHDR and a length Pillow writes the texts
_NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EBADF}  # file systems that cannot sync a folder


def publish(path: str | Path, data: bytes, overwrite: bool = False) -> None:
    """Writes `data` to `path` completely or not at all, like `ldm.files.written_whole`, and syncs the folder to disk.

    Raises FileExistsError if `path` exists and `overwrite` is off, and OSError naming `path` if writing fails.
    """
    path = Path(path)
    try:
        with written_whole(path, overwrite) as part:
            _write_new(part, data)
        _sync_folder(path.parent)
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise


def _write_new(path: Path, data: bytes) -> None:
    binary = getattr(os, "O_BINARY", 0)  # Windows translates newlines without it
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | binary, 0o666)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    if not hasattr(os, "O_DIRECTORY"):  # Windows cannot open a folder
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)


def encode_png(
    pixels: np.ndarray,
    text: str = "",
    compress_level: int = COMPRESS_LEVEL,
    record: str = "",
    unfinished: str = "",
) -> bytes:
    """Encodes uint8 pixels [H, W, 3] as PNG, with `text` under the keyword `parameters`, `record` under `ldm`.

    For a page that still lacks images `unfinished` is the name of its run's file; `unfinished_in` reads it.

    Latin-1 text becomes a tEXt chunk, any other an iTXt chunk. Readers refuse long chunks, so of text above
    64 kB only the last line, the settings, is kept, and nothing if that alone is too long (as of a record, which
    is one line), with a warning.
    """
    info = PngInfo()
    if unfinished:
        info.add_text(_UNFINISHED, unfinished)
    for keyword, content in ((INFOTEXT_KEYWORD, text), (RECORD_KEYWORD, record)):
        if kept := _within_limit(content):
            info.add_text(keyword, kept)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=compress_level, pnginfo=info)
    return buffer.getvalue()


def unfinished_in(path: Path) -> str:
    """Returns the `unfinished` of the page in a file; empty if it is complete or not a regular file."""
    try:
        with open_regular(path) as file:
            head = file.read(_HEAD_BYTES)
    except (OSError, InputError):
        return ""
    length, chunk = int.from_bytes(head[_TEXT_START - 4 : _TEXT_START], "big"), head[_TEXT_START:]
    keyword = b"tEXt" + _UNFINISHED.encode() + b"\0"
    return chunk[: 4 + length].removeprefix(keyword).decode("latin-1") if chunk.startswith(keyword) else ""


def holds(path: Path, data: bytes) -> bool:
    """Returns whether `path` is a regular file of exactly these bytes."""
    try:
        with open_regular(path) as file:
            return os.fstat(file.fileno()).st_size == len(data) and file.read(len(data) + 1) == data
    except (OSError, InputError):
        return False


def _within_limit(text: str) -> str:
    """Returns `text`, or its last line if the text is too long, or nothing if that line is too long as well."""
    size = len(text.encode("utf-8"))
    if size <= MAX_TEXT_BYTES:
        return text
    last = text.rpartition("\n")[2]
    kept = last if len(last.encode("utf-8")) <= MAX_TEXT_BYTES else ""
    logger.warning(
        "metadata of %d bytes left out of an image%s: the limit is %d",
        size, " but for its last line" if kept else "", MAX_TEXT_BYTES,
    )  # fmt: skip
    return kept


class RunFolder:
    """The output folder of one run: `samples/00000.png`, ..., `grid-0000.png`, ... and `sheet-0000.png`, ...

    The constructor creates the folders, tries to write to them, removes the partial files of killed runs and
    reads the highest numbers; InputError if the folder cannot be used. Numbers continue from the highest plus
    one, and a number that exists by now is skipped, so several processes may write into one folder.
    `compress_level` is zlib's, 0 to 9; it never changes pixels. With `look_only` nothing is created or removed; a
    folder that does not exist counts as empty. Use one object from one thread at a time.
    """

    def __init__(
        self, outdir: str | Path, compress_level: int = COMPRESS_LEVEL, look_only: bool = False
    ) -> None:
        self.path = Path(outdir)
        self.samples_path = self.path / "samples"
        self._compress_level = compress_level
        for folder in (self.path, self.samples_path) if not look_only else ():
            _require_usable(folder)
        self._presence = (
            None
            if look_only
            else sweep_and_stay(self.path, lambda: _remove_parts(self.path, self.samples_path))
        )
        self._files: dict[Kind, _NumberedFiles] = {
            "sample": _NumberedFiles(self.samples_path, prefix="", digits=5),
            "grid": _NumberedFiles(self.path, prefix="grid-", digits=4),
            "sheet": _NumberedFiles(self.path, prefix="sheet-", digits=4),
        }

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Releases the folder, so that later runs know that this one has ended (so does the end of the process)."""
        if self._presence is not None:
            os.close(self._presence)
            self._presence = None

    def save_sample(self, pixels: np.ndarray, text: str = "", record: str = "") -> Path:
        """Writes uint8 pixels [H, W, 3], their infotext and record as the next sample. Raises OSError."""
        return self._files["sample"].publish_next(encode_png(pixels, text, self._compress_level, record))

    def save_grid(self, pixels: np.ndarray, text: str = "") -> Path:
        """Writes uint8 pixels [H, W, 3] and their infotext as the next grid. Raises OSError."""
        return self._files["grid"].publish_next(encode_png(pixels, text, self._compress_level))

    def path_of(self, kind: Kind, number: int) -> Path:
        """Returns the path of the file of this kind and number."""
        return self._files[kind].path(number)

    def numbers(self, kind: Kind) -> list[int]:
        """Returns the numbers of the existing files of a kind."""
        return self._files[kind].numbers()

    def next_number(self, kind: Kind) -> int:
        """Returns the highest number of the existing files of a kind, plus one."""
        return self._files[kind].next_number()


class _NumberedFiles:
    """Files `PREFIX` + number + `.png` of one folder, numbered from the highest existing number plus one."""

    def __init__(self, folder: Path, prefix: str, digits: int) -> None:
        self._folder, self._prefix, self._digits = folder, prefix, digits
        self._name = re.compile(rf"{re.escape(prefix)}([0-9]{{{digits},}})\.png")
        self._next = self.next_number()

    def next_number(self) -> int:
        return max(self.numbers(), default=-1) + 1

    def numbers(self) -> list[int]:
        try:
            names = os.listdir(self._folder)
        except (FileNotFoundError, NotADirectoryError):  # nothing was written there yet
            return []
        return [int(match[1]) for match in map(self._name.fullmatch, names) if match]

    def path(self, number: int) -> Path:
        return self._folder / f"{self._prefix}{number:0{self._digits}d}.png"

    def publish_next(self, data: bytes) -> Path:
        while True:
            path = self.path(self._next)
            if not os.path.lexists(path):
                try:
                    publish(path, data)
                except FileExistsError:
                    logger.debug("%s appeared meanwhile", printable(path))
                else:
                    self._next += 1
                    return path
            self._next += 1


def _require_usable(folder: Path) -> None:
    """Creates `folder` and tries to write to it and to list it; InputError of one line if that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = part_beside(folder / "probe")
        try:
            _write_new(probe, b"x")
        finally:
            probe.unlink(missing_ok=True)
        os.listdir(folder)
    except OSError as error:
        reason = "it is a file" if os.path.isfile(folder) else error.strerror
        raise InputError(
            f"cannot use the output folder {printable(folder)}: {reason}; choose another --outdir"
        ) from error


def _remove_parts(*folders: Path) -> None:
    for folder in folders:
        for name in os.listdir(folder):
            if _OWN_PART.fullmatch(name):
                with contextlib.suppress(OSError):  # another process's; harmless
                    (folder / name).unlink()
                    logger.info("removed %s, left by a run that was cut off", printable(folder / name))
