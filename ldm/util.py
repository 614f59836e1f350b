"""Shared by all packages: objects from configs, the error users see, safe display of text, atomic file writing."""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import importlib
import inspect
import itertools
import logging
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, BinaryIO, get_args, get_type_hints

logger = logging.getLogger(__name__)

_LOCK_TRIES = 20


class InputError(ValueError):
    """Invalid input from the user: one line names the value, the reason and the cure.

    The command line turns it into exit code 2 (faults met before anything is generated).
    """


def need(condition: bool, message: str) -> None:
    """Raises `InputError` with the message unless the condition holds."""
    if not condition:
        raise InputError(message)


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


FULL_DISK = {errno.ENOSPC, errno.EDQUOT}
_NO_MEMORY = (
    "can't allocate memory",
    "could not create a primitive",
    "out of memory",
)  # torch, oneDNN, drivers


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether memory ran out: torch raises a type for it on a GPU, elsewhere it is known by the text."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)


def printable(text: object) -> str:
    """Returns `text` with every character that could drive a terminal (controls, bidi marks, surrogates) escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


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
def written_whole(path: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Yields a hidden name to write the file under; on exit `path` becomes the complete file.

    The bytes reach the disk before they get their name. If anything fails, `path` is as it was and the hidden file
    is gone. Raises FileExistsError if `path` exists and `overwrite` is off; where the file system has no hard
    links, two processes that write one name at the same instant may replace each other's file.
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
def temporary_folder(prefix: str, parent: Path) -> Iterator[Path]:
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
def without_leftovers(path: Path, names: str | None = None) -> Iterator[None]:
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


def exists(x: object) -> bool:
    """Returns whether `x` is not None."""
    return x is not None


def default(val: Any, d: Any) -> Any:
    """Returns `val` unless it is None, else `d`, or the result of `d` if it is a function."""
    if exists(val):
        return val
    return d() if inspect.isfunction(d) else d


def ismap(x: Any) -> bool:
    """Returns whether `x` is a batch of maps: a tensor [N, C, H, W] of more than three channels."""
    return _is_batch(x) and x.shape[1] > 3


def isimage(x: Any) -> bool:
    """Returns whether `x` is a batch of images: a tensor [N, C, H, W] of one channel or three."""
    return _is_batch(x) and x.shape[1] in (1, 3)


def _is_batch(x: Any) -> bool:
    torch = sys.modules.get("torch")  # without it there are no tensors
    return torch is not None and isinstance(x, torch.Tensor) and x.dim() == 4


def mean_flat(tensor: Any) -> Any:
    """Returns the mean of each entry of a batch [N, ...]: [N]."""
    return tensor.flatten(1).mean(dim=1)


def count_params(model: Any, verbose: bool = False) -> int:
    """Returns the number of parameters of a model; with `verbose` also logs it, in millions."""
    total = sum(p.numel() for p in model.parameters())
    if verbose:
        logger.info("%s has %.2f million parameters", type(model).__name__, total / 1e6)
    return total


def log_txt_as_img(wh: tuple[int, int], xc: Sequence[str], size: int = 10) -> Any:
    """Draws texts in black on white images of (width, height): a tensor [N, 3, height, width] in [-1, 1].

    Lines break every 40 characters for a width of 256, in proportion for others; `size` is the font's.
    """
    import numpy as np
    import torch
    from PIL import Image, ImageDraw, ImageFont

    font, per_line = ImageFont.load_default(size), max(1, 40 * wh[0] // 256)
    images = []
    for text in xc:
        image = Image.new("RGB", wh, "white")
        lines = [text[start : start + per_line] for start in range(0, len(text), per_line)]
        ImageDraw.Draw(image).text((0, 0), "\n".join(lines), fill="black", font=font)
        images.append(np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1)
    return torch.from_numpy(np.stack(images))


def parallel_data_prefetch(
    func: Callable[..., Any],
    data: Any,
    n_proc: int,
    target_data_type: str = "ndarray",
    cpu_intensive: bool = True,
    use_worker_id: bool = False,
) -> Any:
    """Runs `func` on `n_proc` parts of `data`; returns the results in the order of the data, in one array or list.

    `data` is an array, which is cut along its first axis, or a sequence. Parts are worked on in separate processes if
    `cpu_intensive` (`func` must be a function of a module then), else in threads. With `use_worker_id` the number of
    the part is the keyword argument `worker_id`. `target_data_type` "ndarray" joins the results along their first
    axis, "list" into one list; any other returns them part by part. Raises ValueError without data.
    """
    import numpy as np

    count = min(n_proc, len(data))
    if count < 1:
        raise ValueError(f"there are {len(data)} values for {n_proc} workers; give at least one of each")
    bounds = [len(data) * i // count for i in range(count + 1)]
    parts = [data[first:last] for first, last in itertools.pairwise(bounds)]
    pool = concurrent.futures.ProcessPoolExecutor if cpu_intensive else concurrent.futures.ThreadPoolExecutor
    with pool(count) as workers:
        extra = [{"worker_id": i} if use_worker_id else {} for i in range(count)]
        started = [workers.submit(func, part, **more) for part, more in zip(parts, extra, strict=True)]
        results = [one.result() for one in started]
    if target_data_type == "ndarray":
        return np.concatenate([np.asarray(result) for result in results], axis=0)
    return list(itertools.chain.from_iterable(results)) if target_data_type == "list" else results


def get_obj_from_str(string: str, reload: bool = False) -> Any:
    """Imports the object that a dotted name such as `ldm.models.autoencoder.AutoencoderKL` refers to."""
    module_name, _, name = string.rpartition(".")
    module = importlib.import_module(module_name)
    if reload:
        module = importlib.reload(module)
    return getattr(module, name)


_NOTHING = ("__is_first_stage__", "__is_unconditional__")  # a config's words for "no separate model"


def instantiate_from_config(config: Mapping[str, Any] | str, **overrides: Any) -> Any:
    """Builds `config["target"]` with the keyword arguments in `config["params"]`.

    This function imports whatever the config names. For configs from an untrusted source, check the targets first
    (`ldm.config.read_config` does). An unknown parameter is an `InputError` that names it, unless the target is
    another package's that takes any keyword. "__is_first_stage__" and "__is_unconditional__" give None.
    """
    if config in _NOTHING:
        return None
    if not isinstance(config, Mapping):
        raise InputError(f"a config entry is {config!r}; it must be a mapping with `target`")
    if "target" not in config:
        raise InputError(f"a config entry lacks `target`: it has {sorted(map(str, config)) or 'nothing'}")
    cls = get_obj_from_str(config["target"])
    params = {**(config.get("params") or {}), **overrides}
    _check_parameters(config["target"], cls, params)
    return cls(**params)


def _check_parameters(target: str, cls: Any, params: Mapping[str, Any]) -> None:
    accepted = _accepted(cls)
    if accepted is None:
        return
    unknown = [name for name in params if name not in accepted]
    if unknown:
        raise InputError(
            f"{target} takes no parameter {', '.join(map(repr, unknown))}; it takes {', '.join(accepted)}"
        )
    missing = [name for name, p in accepted.items() if p.default is p.empty and name not in params]
    if missing:
        raise InputError(f"{target} needs the parameter {', '.join(map(repr, missing))}")
    if _is_ours(cls):
        hints = {k: v for base in reversed(cls.__mro__) for k, v in get_type_hints(base.__init__).items()}
        for name, value in params.items():
            if not _fits(value, hints.get(name)):
                raise InputError(
                    f"{target}: {name} is {value!r}, but must be of type {accepted[name].annotation}"
                )


def _accepted(cls: Any) -> dict[str, inspect.Parameter] | None:
    """Returns the parameters that `cls` accepts, including those passed on to its bases; None if unknown.

    Keywords that a class of another package does not name have unknown effects.
    """
    accepted: dict[str, inspect.Parameter] = {}
    for base in inspect.getmro(cls) if inspect.isclass(cls) else (cls,):
        try:
            signature = inspect.signature(base, follow_wrapped=False)
        except (TypeError, ValueError):  # builtins without a signature check their own arguments
            return None
        own = signature.parameters.values()
        named = {p.name: p for p in own if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
        accepted = named | accepted
        if all(p.kind is not p.VAR_KEYWORD for p in own):
            return accepted if base is cls or _is_ours(base) else None
        if not (_is_ours(base) and _is_ours(base.__init__)) or hasattr(base.__init__, "__wrapped__"):
            return None
    return None


def _is_ours(cls: Any) -> bool:
    return str(getattr(cls, "__module__", "")).partition(".")[0] == "ldm"


def warn_of_ignored(owner: str, names: Iterable[str]) -> None:
    """Logs a warning that names the keywords of other versions of the original that `owner` does not use, if any."""
    if names := ", ".join(map(printable, names)):
        logger.warning("%s ignores %s", owner, names)


def only_with(owner: str, **given: tuple[object, object]) -> None:
    """Raises `InputError` if a parameter of the original, as name=(value, neutral), has an unsupported value."""
    for name, (value, neutral) in given.items():
        if value != neutral:
            raise InputError(f"{owner}: {name} is {value!r}, which is not supported; it must be {neutral!r}")


_SCALARS: dict[Any, tuple[type, ...]] = {
    int: (int,),
    float: (int, float),
    str: (str,),
    bool: (bool,),
    type(None): (type(None),),
}


def _fits(value: Any, hint: Any) -> bool:
    """Returns whether a value is of a scalar type, or one of several; other types are not checked."""
    options = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    if not all(option in _SCALARS for option in options):
        return True
    return any(
        isinstance(value, _SCALARS[option]) and (option is bool or not isinstance(value, bool))
        for option in options
    )
