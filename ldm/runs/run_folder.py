"""The runs of an output folder: a new one, the one that --resume continues, and the one that other ranks join."""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from ldm.files import read_side_file
from ldm.job import Job
from ldm.json_value import Json, JsonObject, as_object, load_json
from ldm.runs.description import Content, differences, digest_of, versions
from ldm.runs.options import COMPARED, RunOptions
from ldm.runs.run_file import Page, RunFile, TileSides, folder_lock, open_run_file, run_path, try_lock
from ldm.util import InputError, printable

if TYPE_CHECKING:
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


class NoSuchRun(InputError):
    """No run of a folder has the settings that --resume asks for."""


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
    with folder_lock(folder.samples_path):
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
    raise NoSuchRun(
        f"--resume: no run in {where} has these settings. The latest differs in: "
        f"{'; '.join(found[:SHOWN_DIFFERENCES])}{more}. Use its settings, or drop --resume to start a new run"
    )


def _as_now(content: Content, new: Content) -> Content:
    """Converts the settings in a run file to the terms of this version."""
    old = {**content["made_from"], "sha256": content["sha256"] or new["sha256"]}
    known = [*fields(Job), *(field for field in fields(RunOptions) if dict(field.metadata) == COMPARED)]
    usual = {
        field.name: field.default for field in known if field.default is not MISSING and field.name in new
    }
    if content["version"] == VERSION:  # fields that were added since
        return {**json.loads(json.dumps(usual)), **old}
    unknown = {name: new[name] for name in NOTED_SINCE_3 if name in new}
    several = {
        name: new[name] for name in old if name in new and digest_of(old[name]) == digest_of(new[name])
    }
    return {**json.loads(json.dumps(usual)), **unknown, **old, **several}


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
    path, patience = run_path(folder, first), time.monotonic() + NEWS_SECONDS
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
    living = [run for run in known if _lives(run_path(folder, run["first"]))]
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
            f"--resume: {printable(run_path(folder, first))} claims other numbers of images or pages "
            "than this command makes; leave --resume out"
        )
    later = [run["first"] for run in known if first < run["first"] < first + jobs]
    if later:
        raise InputError(
            f"--resume: a later run in {printable(folder.path)} has the numbers from {min(later)} on, which that run "
            "would need; leave --resume out"
        )


def _read_all(folder: RunFolder) -> list[Content]:
    names = [name for name in os.listdir(folder.path) if _NAME.fullmatch(name)]
    return [content for name in names if (content := _read(folder.path / name)) is not None]


def _read(path: Path) -> Content | None:
    """Reads a run file; one that is invalid, or of another version, is skipped with a warning."""
    try:
        content = as_object(load_json(read_side_file(path, MAX_FILE_BYTES)))
        if _is_sound(content) and _path_number(path) == content["first"]:
            return content
    except (InputError, ValueError) as error:
        logger.debug("%s: %s", printable(path), printable(error)[:100])
    logger.warning("%s is not a run file of this version and is ignored", printable(path))
    return None


def _is_sound(content: JsonObject) -> bool:
    """Returns whether everything in a run file, which may be untrusted, has a valid type and range."""
    if content.get("version") not in READ_VERSIONS:
        return False
    first, jobs, pages, tiles = (content.get(name) for name in ("first", "jobs", "pages", "tiles"))
    sha256, parts, made_from = content.get("sha256"), content.get("parts", {}), content.get("made_from")
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
        and isinstance(made_from, dict)
        and _depth(made_from) <= _MAX_DEPTH
    )


def _is_number(value: Json) -> bool:
    return type(value) is int and 0 <= value <= MAX_NUMBER


def _is_tile(entry: tuple[str, Json]) -> bool:
    size, side = entry
    return re.fullmatch("[0-9]{1,6}x[0-9]{1,6}", size) is not None and (
        side is None or (_is_number(side) and side in range(8, MAX_TILE + 1))
    )


def _has_only(value: Json, kind: type) -> bool:
    return isinstance(value, dict) and all(isinstance(entry, kind) for entry in value.values())


def _depth(tree: Json) -> int:
    """Returns the nesting depth of lists and mappings, followed no deeper than is allowed."""
    level: list[Json] = [tree]
    depth = 0
    while level and depth <= _MAX_DEPTH:
        inner = [node for node in level if isinstance(node, dict | list)]
        level = [child for node in inner for child in (node.values() if isinstance(node, dict) else node)]
        depth += 1
    return depth


def _path_number(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else -1


def _lives(path: Path) -> bool:
    try:
        descriptor = open_run_file(path)
    except OSError:
        return False
    try:
        return not try_lock(descriptor)
    finally:
        os.close(descriptor)
