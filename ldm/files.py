"""Files: read within limits, written completely or not at all, and temporary folders that end with their process."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import BinaryIO

from ldm.util import InputError, printable

logger = logging.getLogger("ldm")
_LOCK_TRIES = 20
_MAX_REASON = 600  # characters


def check_there(path: str | Path, cure: str) -> None:
    """Checks that a path exists and can be read, else raises an InputError that names the cure."""
    shown = printable(path)[:200]
    try:
        os.stat(path)
        if not os.access(path, os.R_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except (FileNotFoundError, NotADirectoryError):
        broken = f"is a broken link to {printable(os.readlink(path))}" if os.path.islink(path) else None
        raise InputError(f"{shown} {broken or 'does not exist'}; {cure}") from None
    except (OSError, ValueError) as error:  # no permission, a loop of links, a name that no file can have
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{shown} cannot be read: {reason}; {cure}") from None


@contextlib.contextmanager
def guarded(
    path: str | os.PathLike[str],
    damage: Callable[[Exception], str],
    kind: type[InputError] = InputError,
) -> Generator[None]:
    """Turns any exception raised inside into an error of `kind`, of one line that begins with the path.

    Files made by others reach deep into libraries, which raise many kinds of exception, so all of them are caught
    here. `damage` describes those that a format has its own words for.
    """
    try:
        yield
    except Exception as error:
        shown, reason = printable(os.fspath(path)), printable(_reason(error, damage)[:_MAX_REASON])
        named = reason.startswith(shown)  # by a guard within this one
        raise kind(reason if named else f"{shown}: {reason}") from error


def _reason(error: Exception, damage: Callable[[Exception], str]) -> str:
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, FileNotFoundError):
        return "no such file; check the path"
    if isinstance(error, MemoryError):
        return "does not fit into memory"
    if isinstance(error, OSError) and error.errno:
        return f"cannot be read: {error.strerror}"
    return damage(error)


FULL_DISK = {errno.ENOSPC, errno.EDQUOT}


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Opens a regular file for reading; a folder, pipe, socket, device or broken link is refused without blocking.

    The `InputError` names the kind of file, and leaves the path to the caller. Raises `OSError` as `open` does.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        if not os.path.islink(path):
            raise
        raise InputError(f"is a broken link to {printable(os.readlink(path))}") from None
    if stat.S_ISDIR(mode):
        raise InputError("is a folder, and a single file is needed here; give the file inside it")
    if stat.S_ISREG(mode):
        file = open(path, "rb", opener=_open_at_once)  # noqa: SIM115 - the caller closes it
        if stat.S_ISREG(os.fstat(file.fileno()).st_mode):  # it may have been replaced since
            return file
        file.close()
    raise InputError("is a pipe, socket or device, not a regular file")


def _open_at_once(path: str, flags: int) -> int:
    """Opens without waiting for the other end of a pipe."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


MAX_SIDE_FILE = 16 * 2**20  # bytes; the largest valid ones, CLIP's token tables, have one million


def read_side_file(path: str | os.PathLike[str], limit: int = MAX_SIDE_FILE) -> bytes:
    """Reads the bytes of a small file that describes something: a regular file of at most `limit` bytes.

    Raises an `InputError` that begins with the path for anything else, unread, and for errors of the system.
    """
    shown = printable(os.fspath(path))
    try:
        with open_regular(path) as file:
            too_large = os.fstat(file.fileno()).st_size > limit
            data = b"" if too_large else file.read(limit + 1)
    except InputError as error:
        raise InputError(f"{shown} {error}") from None
    except FileNotFoundError:
        raise InputError(f"{shown} does not exist") from None
    except OSError as error:
        raise InputError(f"{shown} cannot be read: {error.strerror or printable(error)}") from None
    if too_large or len(data) > limit:
        raise InputError(f"{shown} is larger than {limit / 2**20:g} MB; is it the right file?")
    return data


def files_below(folder: str | os.PathLike[str], what: str) -> list[Path]:
    """Returns all files in a folder and its subfolders, sorted; raises `InputError` if `folder` cannot be listed.

    `what` names the folder in the message ("the LoRA folder"). Subfolders that cannot be listed are skipped.
    """
    try:
        os.listdir(folder)
    except FileNotFoundError:
        raise InputError(f"{what} {printable(folder)} does not exist") from None
    except NotADirectoryError:
        raise InputError(
            f"{what} {printable(folder)} is not a folder; give the one that holds the file"
        ) from None
    except OSError as error:
        raise InputError(f"{what} {printable(folder)} cannot be listed: {error.strerror or error}") from None
    return [path for path in sorted(Path(folder).rglob("*")) if path.is_file()]


_NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.EMLINK}


def part_beside(path: Path) -> Path:
    """Returns a hidden name in the folder of `path`, for a file that is not complete yet."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")


@contextlib.contextmanager
def written_whole(path: str | Path, overwrite: bool = False) -> Generator[Path]:
    """Yields a hidden name to write the file under; on exit `path` becomes the complete file.

    The bytes reach the disk before they get their name. If anything fails, `path` is as it was and the hidden file is
    removed. Raises FileExistsError if `path` exists and `overwrite` is off; if the file system has no hard links, two
    processes that write one name at the same instant may replace each other's file.
    """
    path = Path(path)
    part = part_beside(path)
    try:
        yield part
        with open(part, "r+b") as file:
            os.fsync(file.fileno())
        _give_name(part, path, overwrite)
    finally:
        with contextlib.suppress(OSError):  # removed already, or by the next run
            part.unlink()


def _give_name(part: Path, path: Path, overwrite: bool) -> None:
    if overwrite:
        os.replace(part, path)
        return
    try:
        os.link(part, path)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        os.replace(part, path)


def sweep_and_stay(folder: Path, sweep: Callable[[], None]) -> int | None:
    """Marks `folder` as in use by a living process, after `sweep` has removed files of killed processes.

    The mark is a shared lock on the folder, which the kernel frees even after a kill. Whoever gets the exclusive lock
    knows that no unfinished file in it has a living writer. Returns the descriptor that holds the lock, or None where
    folders cannot be locked (then nothing is removed).
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            sweep()
        for _ in range(_LOCK_TRIES):  # another process's removal is short; any other lock is not waited for
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return descriptor
            time.sleep(0.1)
    except OSError as error:
        logger.debug("%s cannot be locked: %s", printable(folder), error.strerror)
    os.close(descriptor)
    return None


@contextlib.contextmanager
def temporary_folder(prefix: str, parent: Path) -> Generator[Path]:
    """Yields a new folder in `parent`, removed on exit; those left by killed processes are removed first."""
    own = re.compile(re.escape(prefix) + "[a-z0-9_]{8}")

    def is_ours(entry: os.DirEntry[str]) -> bool:
        found = own.fullmatch(entry.name) is not None and entry.is_dir(follow_symlinks=False)
        return found and entry.stat(follow_symlinks=False).st_uid == os.getuid()

    def sweep() -> None:
        for entry in filter(is_ours, list(os.scandir(parent))):
            shutil.rmtree(entry.path, ignore_errors=True)

    held = sweep_and_stay(parent, sweep)
    try:
        with tempfile.TemporaryDirectory(prefix=prefix, dir=parent) as folder:
            yield Path(folder)
    finally:
        if held is not None:
            os.close(held)


@contextlib.contextmanager
def without_leftovers(path: Path, names: str | None = None) -> Generator[None]:
    """Holds the folder of `path` while it is written; hidden parts left by killed processes are removed on entry.

    With `names`, a regular expression, so are those of all files in its folder whose names match.
    """
    own = re.compile(rf"\.({names or re.escape(path.name)})\.[0-9a-f]{{8}}\.part")

    def sweep() -> None:
        for entry in os.scandir(path.absolute().parent):
            if own.fullmatch(entry.name):
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path, ignore_errors=True)
                else:
                    with contextlib.suppress(OSError):
                        os.unlink(entry.path)

    held = sweep_and_stay(path.absolute().parent, sweep)
    try:
        yield
    finally:
        if held is not None:
            os.close(held)
