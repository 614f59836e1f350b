"""What a run is made from, in a file of its folder: the claim on its numbers, and what --resume compares.

`run-00000.json` belongs to the run whose first image is samples/00000.png. It is written before the first image
and says nothing of progress: the images themselves do. The process that holds it locked is the run's.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import platform
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ldm import __version__
from ldm.job import Job
from ldm.util import InputError, printable, written_whole

if TYPE_CHECKING:
    from ldm.images.writer import RunFolder

logger = logging.getLogger("ldm")

VERSION = 2
SHOWN_DIFFERENCES = 8
NEWS_SECONDS = 60  # after which a network file system shows what another machine wrote
_NAME = re.compile(r"run-([0-9]{5,})\.json")
_DIGEST_LENGTH = 8  # hex digits of a prompt's SHA-256: only to say which of them was changed

Content = dict[str, Any]
Page = Literal["grid", "sheet"]


def describe(jobs: Sequence[Job], batches: Sequence[Sequence[int]], settings: Mapping[str, Any]) -> Content:
    """What the pixels of a run depend on, by name, as JSON has it.

    A field of the jobs stands as it is where all agree, else as a digest of all values. `settings` are what
    the jobs do not hold. The jobs are looked at once, in order.
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
        self._last: Any = None

    def add(self, value: Any) -> None:
        if self._count == 0 or value != self._last:
            self._changes += 1
            self._sha.update(f"{self._count}:{value!r};".encode("utf-8", "surrogatepass"))
            self._last = value
        self._count += 1

    def summary(self) -> Any:
        if self._changes > 1:
            return f"several, digest {self._sha.hexdigest()[:16]}"
        return (
            asdict(self._last)
            if is_dataclass(self._last) and not isinstance(self._last, type)
            else self._last
        )


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def versions() -> dict[str, str]:
    """What the last bits and the files' bytes depend on besides: libraries, processor, threads."""
    import numpy
    import PIL
    import torch

    return {
        "ldm": __version__,
        "torch": str(torch.__version__),
        "numpy": numpy.__version__,
        "pillow": PIL.__version__,
        "machine": platform.machine(),
        "threads": str(torch.get_num_threads()),
    }


def differences(old: Content, new: Content) -> list[str]:
    """What differs between two descriptions, a line each: name, old value, new value."""
    found = []
    for name in dict.fromkeys([*old, *new]):
        before, after = old.get(name), new.get(name)
        if before == after or (name == "prompt" and "prompts" in old):
            continue
        if name == "prompts" and isinstance(before, str) and isinstance(after, str):
            found.append(_prompt_difference(before, after))
        elif isinstance(before, dict) and isinstance(after, dict):
            found += [f"{name}.{line}" for line in differences(before, after)]
        else:
            found.append(f"{name}: {_shown(before)}, now {_shown(after)}")
    return found


def _prompt_difference(before: str, after: str) -> str:
    # lists of prompts can differ in length; that is told where no line differs
    pairs = zip(*(re.findall(f".{{{_DIGEST_LENGTH}}}", text) for text in (before, after)), strict=False)
    number = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    if number is None:
        count, now = len(before) // _DIGEST_LENGTH, len(after) // _DIGEST_LENGTH
        return f"prompts: {count}, now {now}"
    return f"prompts: that of image {number + 1} (line {number + 1} of a file that is used once) was another"


def _shown(value: Any) -> str:
    text = "nothing" if value is None else value if isinstance(value, str) else json.dumps(value)
    return printable(text if len(text) <= 60 else f"{text[:57]}...")


class RunFile:
    """A run's claim on the numbers of its images and grids; `close` ends it, as does the end of the process."""

    def __init__(self, folder: RunFolder, content: Content, hashes: Mapping[str, Callable[[], str]]) -> None:
        self._folder, self._content, self._hashes = folder, content, hashes
        self._lock: int | None = None
        self.first: int = content["first"]
        self.jobs: int = content["jobs"]

    @property
    def hashes(self) -> Mapping[str, Callable[[], str]]:
        """What gives the SHA-256 of each file of weights."""
        return self._hashes

    @property
    def path(self) -> Path:
        return _path(self._folder, self.first)

    def sample_path(self, index: int) -> Path:
        """The file of the run's image `index`."""
        return self._folder.path_of("sample", self.first + index)

    def existing(self) -> set[int]:
        """The images that have a file already."""
        numbers = self._folder.numbers("sample")
        return {number - self.first for number in numbers if 0 <= number - self.first < self.jobs}

    def complete(self) -> None:
        """Notes the hashes, which take a while for large files; called before the first image is written."""
        if self._content["sha256"] is None:
            self._content["sha256"] = {name: digest() for name, digest in self._hashes.items()}
            self.write()

    def publish_page(self, kind: Page, page: int, data: bytes, whole: bool) -> None:
        """Writes one page of the grid, or one sheet; what a broken run made of what it had is replaced."""
        from ldm.images.writer import publish

        path = self._folder.path_of(kind, self._content["pages"][kind][0] + page)
        stale: list[str] = self._content["unfinished"]
        if not whole:
            stale.append(hashlib.sha256(data).hexdigest())
            self.write()
        with contextlib.suppress(
            FileExistsError
        ):  # of another process of this run, which ended as this one did
            if not path.exists():
                publish(path, data)
                return
        there = path.read_bytes()
        if hashlib.sha256(there).hexdigest() in stale:
            publish(path, data, overwrite=True)
        elif there != data:
            logger.warning("%s is not this run's, so it stays as it is", printable(path))

    def lock(self) -> None:
        """Marks an existing file as this process's; InputError if it is another's."""
        self._lock = os.open(self.path, os.O_RDONLY)
        if not _try_lock(self._lock):
            self.close()
            raise InputError(f"another process is still at work on {printable(self.path)}; wait for it")

    def share(self) -> None:
        """Lets the other processes of the run hold it too; nobody writes it from then on."""
        self.complete()
        with _alone_in(self._folder.samples_path):
            self.close()
            self._lock = os.open(self.path, os.O_RDONLY)
            _try_lock(self._lock, shared=True)

    def write(self) -> None:
        """Writes the file whole, locked before it has its name."""
        with written_whole(self.path, overwrite=True) as part:
            part.write_text(json.dumps(self._content, indent=1) + "\n", encoding="utf-8")
            descriptor = os.open(part, os.O_RDONLY)
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
) -> RunFile:
    """A new run behind the highest number, or with `resume` the newest one in the folder made from the same.

    `pages` says how many pages the grid has and how many sheets there are, `hashes` gives the SHA-256 of the files
    of weights. Raises InputError where nothing matches, naming what differs from the newest run, or where the run's
    own process still lives.
    """
    with _alone_in(folder.samples_path):
        known = _read_all(folder)
        if resume and (known or folder.numbers("sample")):
            return _resumed(folder, known, made_from, hashes)
        run = RunFile(folder, _new_content(folder, known, made_from, jobs, pages), hashes)
        run.write()
        return run


def join_run(folder: RunFolder, first: int, made_from: Content) -> RunFile:
    """The run whose first image is number `first`, which another process shares with this one.

    Raises InputError where that one makes something else.
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
    """Numbers go on behind the highest file, and behind what a living process has claimed."""
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
        "pages": claimed,  # by kind: the first number, and how many
        "made_from": made_from,
        "sha256": None,
        "versions": versions(),
        "unfinished": [],  # digests of pages that lack images
    }


def _resumed(
    folder: RunFolder, known: Sequence[Content], made_from: Content, hashes: Mapping[str, Callable[[], str]]
) -> RunFile:
    where = printable(folder.path)
    if not known:
        raise InputError(
            f"{where} has pictures but no run file, so there is no run to resume; leave --resume out"
        )
    sha256 = {name: digest() for name, digest in hashes.items()}
    new = {**made_from, "sha256": sha256}
    for content in sorted(known, key=lambda run: run["first"], reverse=True):
        old = {**content["made_from"], "sha256": content["sha256"] or sha256}
        if old == new:
            _check_numbers(folder, content, known)
            run = RunFile(folder, content, hashes)
            run.lock()
            for line in differences(content["versions"], versions()):
                logger.warning("the run began with another %s; last bits may differ", line)
            return run
    newest = max(known, key=lambda run: run["first"])
    found = differences({**newest["made_from"], "sha256": newest["sha256"] or sha256}, new)
    more = f"; and {len(found) - SHOWN_DIFFERENCES} more" if len(found) > SHOWN_DIFFERENCES else ""
    raise InputError(
        f"--resume: no run in {where} was made from the same; of the newest differ: "
        f"{'; '.join(found[:SHOWN_DIFFERENCES])}{more}. Go back to that, or leave --resume out"
    )


def _check_numbers(folder: RunFolder, content: Content, known: Sequence[Content]) -> None:
    later = [
        run["first"] for run in known if content["first"] < run["first"] < content["first"] + content["jobs"]
    ]
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
    """What a run file says; one that is none, or of another version, is passed over with a warning."""
    kinds = {"version": int, "first": int, "jobs": int, "pages": dict, "made_from": dict}
    kinds |= {"sha256": dict | None, "versions": dict, "unfinished": list}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        sound = all(isinstance(content[name], kind) for name, kind in kinds.items())
        if sound and content["version"] == VERSION and _path_number(path) == content["first"]:
            return content
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        logger.debug("%s: %s", printable(path), printable(error)[:100])
    logger.warning("%s is no run file of this version, so it is passed over", printable(path))
    return None


def _path_number(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else -1


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Within it no other process chooses numbers in this folder. Where folders cannot be locked, that is luck."""
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
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        return not _try_lock(descriptor)
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int, shared: bool = False) -> bool:
    """Locks a file until its descriptor is closed; False if another has it. Without locks, always True."""
    try:
        import fcntl

        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError) as error:
        logger.debug("no lock: %s", error)
    return True
