"""The file in a run's folder that describes it: the claim on its numbers, and the settings that --resume compares.

`run-00000.json` belongs to the run whose first image is samples/00000.png. It is written before the first image and
does not record progress: the images themselves do. The process that holds its lock is the run's.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import platform
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from ldm import __version__
from ldm.job import Job
from ldm.util import InputError, printable, read_side_file, written_whole

if TYPE_CHECKING:
    import numpy as np

    from ldm.images.writer import RunFolder

logger = logging.getLogger("ldm")

VERSION = 3
READ_VERSIONS = (2, 3)
# fields that files of version 2 lack: they count as unchanged
NOTED_SINCE_3 = ("classes", "config_files", "embedding_names", "lora_settings", "safety_model", "vocabulary")
MAX_FILE_BYTES = 64 * 2**20  # a million images have 8 MB of digests
MAX_NUMBER = 10**9  # of a file
_MAX_DEPTH = 6
MAX_TILE = 4096  # latent cells a side
SHOWN_DIFFERENCES = 8
NEWS_SECONDS = 60  # after which a network file system shows files of another machine
_NAME = re.compile(r"run-([0-9]{5,})\.json")
_DIGEST = re.compile(", digest [0-9a-f]{16}$")  # of values that differ among the jobs
_DIGEST_LENGTH = 8  # hex digits of a prompt's SHA-256: only to find which of them changed

Content = dict[str, Any]
Page = Literal["grid", "sheet"]
TileSides = Mapping[tuple[int, int], int | None]  # by height and width of the images


def describe(jobs: Sequence[Job], batches: Sequence[Sequence[int]], settings: Mapping[str, Any]) -> Content:
    """Describes everything that a run's pixels depend on, by name, as JSON values.

    A field of the jobs has its value if all agree, else the first one and a digest of all. `settings` are the values
    that jobs do not hold. The jobs are read once, in order.
    """
    values = {field.name: _Values() for field in fields(Job)}
    digests = []
    for job in jobs:
        for name, seen in values.items():
            seen.add(getattr(job, name))
        digests.append(_sha256(job.prompt)[:_DIGEST_LENGTH])
    made = {name: seen.summary() for name, seen in values.items()}
    made |= {"prompts": "".join(digests), "batches": _sha256(repr([list(batch) for batch in batches]))[:16]}
    return json.loads(json.dumps({**made, **settings}))


class _Values:
    """The values of one field of all jobs."""

    def __init__(self) -> None:
        self._changes, self._count, self._sha = 0, 0, hashlib.sha256()
        self._first: Any = None
        self._last: Any = None

    def add(self, value: Any) -> None:
        if self._count == 0:
            self._first = value
        if self._count == 0 or value != self._last:
            self._changes += 1
            self._sha.update(f"{self._count}:{value!r};".encode("utf-8", "surrogatepass"))
            self._last = value
        self._count += 1

    def summary(self) -> Any:
        if self._changes > 1:
            first = self._first if isinstance(self._first, int | float) else printable(self._first)[:40]
            return f"{first} and others, digest {self._sha.hexdigest()[:16]}"
        return (
            asdict(self._last)
            if is_dataclass(self._last) and not isinstance(self._last, type)
            else self._last
        )


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def versions() -> dict[str, str]:
    """Returns what else the last bits and the files' bytes depend on: libraries, processor, threads."""
    import numpy
    import PIL
    import torch

    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {
        "ldm": __version__,
        "torch": str(torch.__version__),
        "numpy": numpy.__version__,
        "pillow": PIL.__version__,
        "machine": platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        **gpu,
    }


def differences(old: Content, new: Content) -> list[str]:
    """Returns the differences of two descriptions: name, old value and new value of each. Controls are escaped."""
    found = []
    for name in dict.fromkeys([*old, *new]):
        before, after = old.get(name), new.get(name)
        if before == after or (name == "prompt" and "prompts" in old):
            continue
        if name == "prompts" and isinstance(before, str) and isinstance(after, str):
            found.append(_prompt_difference(before, after))
        elif isinstance(before, dict) and isinstance(after, dict):
            found += [f"{_shown(name, 200)}.{line}" for line in differences(before, after)]
        else:
            shown, now = _shown(before), _shown(after)
            if _DIGEST.sub("", shown) != _DIGEST.sub("", now):
                shown, now = _DIGEST.sub("", shown), _DIGEST.sub("", now)
            found.append(f"{_shown(name, 200)} ({shown} there, {now} now)")
    return found


def _prompt_difference(before: str, after: str) -> str:
    # lists of prompts can differ in length; that is reported if no line differs
    pairs = zip(*(re.findall(f".{{{_DIGEST_LENGTH}}}", text) for text in (before, after)), strict=False)
    number = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    if number is None:
        count, now = len(before) // _DIGEST_LENGTH, len(after) // _DIGEST_LENGTH
        return f"prompts ({count} there, {now} now)"
    return f"the prompt of image {number + 1} (line {number + 1} of a file that is used once)"


def _shown(value: Any, longest: int = 60) -> str:
    text = "nothing" if value is None else value if value and isinstance(value, str) else json.dumps(value)
    return printable(text if len(text) <= longest else f"{text[: longest - 3]}...")


class RunFile:
    """A run's claim on the numbers of its images and grids; `close` or the end of the process releases it."""

    def __init__(self, folder: RunFolder, content: Content, hashes: Mapping[str, Callable[[], str]]) -> None:
        self._folder, self._content, self._hashes = folder, content, hashes
        self._lock: int | None = None
        self._shared = False
        self._writing = threading.RLock()  # the thread that writes the images completes the file
        self.first: int = content["first"]
        self.jobs: int = content["jobs"]

    @property
    def hashes(self) -> Mapping[str, Callable[[], str]]:
        """For each file of weights, a function that returns its SHA-256."""
        return self._hashes

    @property
    def path(self) -> Path:
        return _path(self._folder, self.first)

    def sample_path(self, index: int) -> Path:
        """Returns the file of the run's image `index`."""
        return self._folder.path_of("sample", self.first + index)

    def existing(self) -> set[int]:
        """Returns the images whose files exist."""
        numbers = self._folder.numbers("sample")
        return {number - self.first for number in numbers if 0 <= number - self.first < self.jobs}

    def complete(self) -> None:
        """Adds the hashes, which take a while for large files; called before the first image is written."""
        if self._content["sha256"] is None:
            sha256 = {name: digest() for name, digest in self._hashes.items()}
            with self._writing:
                self._content["sha256"] = sha256
                self.write()

    @property
    def tiles(self) -> TileSides | None:
        """Returns the tiles that the run's first process chose, by the images' height and width; None before."""
        noted = self._content.get("tiles")
        if noted is None:
            return None
        return {_size(words): side for words, side in noted.items()}

    def note_tiles(self, sides: TileSides, leads: bool = True, shared: bool = False) -> None:
        """Records the chosen tiles; of several processes the one that `leads` writes them."""
        self._content["tiles"] = {f"{width}x{height}": side for (height, width), side in sides.items()}
        if leads:
            self.write()
            if shared:
                self.share()

    def parts_of(self, first: int) -> list[int] | None:
        """Returns the sizes of the parts of the batch that begins with image `first`; None if it was undivided."""
        return self._content.get("parts", {}).get(str(first))

    def note_parts(self, first: int, sizes: Sequence[int]) -> None:
        """Records that the batch that begins with image `first` is made in parts of these sizes.

        A run of several processes, which share the file, records it only in the images' metadata.
        """
        if self._shared or self.parts_of(first) == list(sizes):
            return
        with self._writing:
            self._content.setdefault("parts", {})[str(first)] = list(sizes)
            self.write()

    def has_pages(self) -> bool:
        """Returns whether every page and sheet of the run exists, of all images."""
        from ldm.images.writer import unfinished_in

        claimed: Mapping[Page, list[int]] = self._content["pages"]
        paths = [
            self._folder.path_of(kind, first + i)
            for kind, (first, count) in claimed.items()
            for i in range(count)
        ]
        return all(path.is_file() and not unfinished_in(path) for path in paths)

    def publish_page(self, kind: Page, page: int, pixels: np.ndarray, whole: bool) -> None:
        """Writes one page of the grid, or one sheet; an incomplete one of an interrupted run is replaced.

        The metadata of such a page state that it is unfinished, and its run, so no run file can cause another image
        to be overwritten.
        """
        from ldm.images.writer import encode_png, holds, publish, unfinished_in

        path = self._folder.path_of(kind, self._content["pages"][kind][0] + page)
        data = encode_png(pixels, unfinished="" if whole else self.path.name)
        with contextlib.suppress(
            FileExistsError
        ):  # of another process of this run, which ended in the same state
            if not os.path.lexists(path):
                publish(path, data)
                return
        if holds(path, data):
            return
        if unfinished_in(path) == self.path.name:
            publish(path, data, overwrite=True)
        else:
            logger.warning("%s was not written by this run and is left alone", printable(path))

    def lock(self) -> None:
        """Locks an existing file for this process; InputError if another process holds it."""
        self._lock = _open(self.path)
        if not _try_lock(self._lock):
            self.close()
            raise InputError(f"another process is still working on {printable(self.path)}; wait for it")

    def share(self) -> None:
        """Lets the other processes of the run share the lock; the file is not written after that."""
        self.complete()
        with _alone_in(self._folder.samples_path):
            self.hold()

    def hold(self) -> None:
        """Takes a shared lock on the file."""
        self.close()
        self._shared = True
        self._lock = _open(self.path)
        _try_lock(self._lock, shared=True)

    def write(self) -> None:
        """Writes the file, locked before it gets its name."""
        with self._writing:
            with written_whole(self.path, overwrite=True) as part:
                part.write_text(json.dumps(self._content, indent=1) + "\n", encoding="utf-8")
                descriptor = _open(part)
                _try_lock(descriptor)
            self.close()
            self._lock = descriptor

    def close(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def open_run(
    folder: RunFolder,
    made_from: Content,
    jobs: int,
    pages: Mapping[Page, int],
    hashes: Mapping[str, Callable[[], str]],
    resume: bool,
    tiles: TileSides | None = None,
) -> RunFile:
    """Opens a new run after the highest number, or with `resume` the newest one in the folder with equal settings.

    `pages` are the numbers of pages of the grid and of sheets, `hashes` returns the SHA-256 of the files of weights,
    `tiles` are those of a new run. Raises InputError if no run matches, naming the differences from the newest run,
    or if the run's process is still alive.
    """
    with _alone_in(folder.samples_path):
        if resume:
            run = find_run(folder, made_from, jobs, pages, hashes)
            if run is not None:
                run.lock()
                return run
        content = _new_content(folder, _read_all(folder), made_from, jobs, pages)
        run = RunFile(folder, content, hashes)
        if tiles is None:
            run.write()
        else:
            run.note_tiles(tiles)
        return run


def find_run(
    folder: RunFolder,
    made_from: Content,
    jobs: int,
    pages: Mapping[Page, int],
    hashes: Mapping[str, Callable[[], str]],
) -> RunFile | None:
    """Finds the newest run in a folder with equal settings; None where the folder is empty. Nothing is written.

    Raises InputError as `open_run` does with `resume`.
    """
    known, where = _read_all(folder), printable(folder.path)
    if not known:
        if folder.numbers("sample"):
            raise InputError(
                f"{where} has images but no run file, so there is no run to resume; leave --resume out"
            )
        return None
    sha256 = {name: digest() for name, digest in hashes.items()}
    new = {**made_from, "sha256": sha256}
    for content in sorted(known, key=lambda run: run["first"], reverse=True):
        if _as_now(content, new) == new:
            _check_numbers(folder, content, known, jobs, pages)
            found = differences(
                {name: content["versions"].get(name, now) for name, now in versions().items()}, versions()
            )
            if found:
                logger.warning(
                    "the run began with other versions, so last bits may differ: %s", "; ".join(found)
                )
            return RunFile(folder, content, hashes)
    found = differences(_as_now(max(known, key=lambda run: run["first"]), new), new)
    more = f"; and {len(found) - SHOWN_DIFFERENCES} more" if len(found) > SHOWN_DIFFERENCES else ""
    raise InputError(
        f"--resume: no run in {where} has these settings. The latest differs in: "
        f"{'; '.join(found[:SHOWN_DIFFERENCES])}{more}. Use its settings, or drop --resume to start a new run"
    )


def _as_now(content: Content, new: Content) -> Content:
    """Converts the settings in a run file to the terms of this version."""
    old = {**content["made_from"], "sha256": content["sha256"] or new["sha256"]}
    if content["version"] == VERSION:
        return old
    usual = {field.name: field.default for field in fields(Job) if field.default is not MISSING}
    unknown = {name: new[name] for name in NOTED_SINCE_3 if name in new}
    several = {
        name: new[name] for name in old if name in new and _digest_of(old[name]) == _digest_of(new[name])
    }
    return {**json.loads(json.dumps(usual)), **unknown, **old, **several}


def _digest_of(value: object) -> object:
    """Returns the digest of several values, which versions word differently; else the value itself."""
    found = _DIGEST.search(value) if isinstance(value, str) else None
    return found[0] if found else value


def last_seed(folder: Path) -> int | None:
    """Returns the seed of a folder's newest run; None where there is none. Nothing is written."""
    known = [content for path in folder.glob("run-*.json") if (content := _read(path)) is not None]
    if not known:
        return None
    seed = max(known, key=lambda run: run["first"])["made_from"].get("seed")
    first = re.match("[0-9]+", str(seed))
    return int(first[0]) if first else None


def join_run(folder: RunFolder, first: int, made_from: Content) -> RunFile:
    """Opens the run whose first image is number `first`, which another process shares with this one.

    Raises InputError if that process has other settings.
    """
    path, patience = _path(folder, first), time.monotonic() + NEWS_SECONDS
    while not path.exists() and time.monotonic() < patience:
        time.sleep(0.1)
    content = _read(path)
    if content is None:
        raise InputError(f"{printable(path)}, which the first process wrote, cannot be read here")
    found = differences(content["made_from"], made_from)
    if found:
        raise InputError(f"the processes of a run must be given the same; these differ: {'; '.join(found)}")
    sha256: dict[str, str] = content["sha256"]
    run = RunFile(folder, content, {name: partial(str, digest) for name, digest in sha256.items()})
    run.share()
    return run


def _new_content(
    folder: RunFolder, known: Sequence[Content], made_from: Content, jobs: int, pages: Mapping[Page, int]
) -> Content:
    """Makes the content of a new run file: numbers follow the highest file and all claims of living processes."""
    living = [run for run in known if _lives(_path(folder, run["first"]))]
    first = max([folder.next_number("sample"), *(run["first"] + run["jobs"] for run in living)])
    claimed = {
        kind: [max([folder.next_number(kind), *(sum(run["pages"].get(kind, [])) for run in living)]), count]
        for kind, count in pages.items()
    }
    return {
        "version": VERSION,
        "first": first,
        "jobs": jobs,
        "pages": claimed,  # by kind: the first number, and the count
        "made_from": made_from,
        "sha256": None,
        "versions": versions(),
        "tiles": None,  # the sides of the chosen ones, by the size of the images
    }


def _check_numbers(
    folder: RunFolder, content: Content, known: Sequence[Content], jobs: int, pages: Mapping[Page, int]
) -> None:
    """Checks that a run file claims all numbers that its run needs, and that no later run has them."""
    first = content["first"]
    claimed: Mapping[str, list[int]] = content["pages"]
    if content["jobs"] != jobs or any(n and claimed.get(kind, [0, 0])[1] != n for kind, n in pages.items()):
        raise InputError(
            f"--resume: {printable(_path(folder, first))} claims other numbers of images or pages than this command "
            "makes; leave --resume out"
        )
    later = [run["first"] for run in known if first < run["first"] < first + jobs]
    if later:
        raise InputError(
            f"--resume: a later run in {printable(folder.path)} has the numbers from {min(later)} on, which that run "
            "would need; leave --resume out"
        )


def _path(folder: RunFolder, first: int) -> Path:
    return folder.path / f"run-{first:05d}.json"


def _read_all(folder: RunFolder) -> list[Content]:
    names = [name for name in os.listdir(folder.path) if _NAME.fullmatch(name)]
    return [content for name in names if (content := _read(folder.path / name)) is not None]


def _read(path: Path) -> Content | None:
    """Reads a run file; one that is invalid, or of another version, is skipped with a warning."""
    try:
        content = json.loads(read_side_file(path, MAX_FILE_BYTES))
        if _is_sound(content) and _path_number(path) == content["first"]:
            return content
    except (InputError, ValueError, RecursionError) as error:
        logger.debug("%s: %s", printable(path), printable(error)[:100])
    logger.warning("%s is not a run file of this version and is ignored", printable(path))
    return None


def _is_sound(content: object) -> bool:
    """Returns whether everything in a run file, which may be untrusted, has a valid type and range."""
    if not isinstance(content, dict) or content.get("version") not in READ_VERSIONS:
        return False
    first, jobs, pages, tiles = (content.get(name) for name in ("first", "jobs", "pages", "tiles"))
    sha256, parts = content.get("sha256"), content.get("parts", {})
    return (
        _is_number(first)
        and _is_number(jobs)
        and isinstance(pages, dict)
        and set(pages) <= set(get_args(Page))
        and all(isinstance(p, list) and len(p) == 2 and all(map(_is_number, p)) for p in pages.values())
        and (sha256 is None or _has_only(sha256, str))
        and _has_only(content.get("versions"), str)
        and (tiles is None or (isinstance(tiles, dict) and all(map(_is_tile, tiles.items()))))
        and isinstance(parts, dict)
        and all(
            isinstance(sizes, list) and all(map(_is_number, sizes)) and all(sizes) for sizes in parts.values()
        )
        and isinstance(content.get("made_from"), dict)
        and _depth(content["made_from"]) <= _MAX_DEPTH
    )


def _is_number(value: object) -> bool:
    return type(value) is int and 0 <= value <= MAX_NUMBER


def _is_tile(entry: tuple[str, object]) -> bool:
    size, side = entry
    return re.fullmatch("[0-9]{1,6}x[0-9]{1,6}", size) is not None and (
        side is None or (_is_number(side) and side in range(8, MAX_TILE + 1))
    )


def _size(words: str) -> tuple[int, int]:
    """Parses height and width from WIDTHxHEIGHT."""
    width, height = words.split("x")
    return int(height), int(width)


def _has_only(value: object, kind: type) -> bool:
    return isinstance(value, dict) and all(isinstance(entry, kind) for entry in value.values())


def _depth(tree: object) -> int:
    """Returns the nesting depth of lists and mappings, followed no deeper than is allowed."""
    level, depth = [tree], 0
    while level and depth <= _MAX_DEPTH:
        inner = [node for node in level if isinstance(node, dict | list)]
        level = [child for node in inner for child in (node.values() if isinstance(node, dict) else node)]
        depth += 1
    return depth


def _open(path: Path) -> int:
    """Opens a file to lock it, without blocking on a pipe."""
    return os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))


def _path_number(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else -1


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Holds an exclusive lock on the folder while numbers are chosen; a no-op where folders cannot be locked."""
    try:
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY)
    except ImportError:  # Windows
        yield
        return
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _lives(path: Path) -> bool:
    try:
        descriptor = _open(path)
    except OSError:
        return False
    try:
        return not _try_lock(descriptor)
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int, shared: bool = False) -> bool:
    """Locks a file until its descriptor is closed; False if another process holds it. Without locks, always True."""
    try:
        import fcntl

        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError) as error:
        logger.debug("no lock: %s", error)
    return True
