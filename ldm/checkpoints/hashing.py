"""SHA-256 of checkpoint files, remembered from run to run in a small file in the user's cache folder."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldm.files import written_whole
from ldm.json_value import JsonObject, as_object, load_json
from ldm.places import cache_path

logger = logging.getLogger(__name__)

_CHUNK_BYTES = 2**20


def file_sha256(path: str | os.PathLike[str], again: bool = False) -> str:
    """The SHA-256 of a file as 64 hex digits; computed again only if its size, time or inode has changed.

    Damage can leave all three as they were: with `again` the file is read in any case.
    Raises `OSError` if the file cannot be read. A cache that cannot be read or written is only logged.
    """
    resolved = Path(path).resolve()
    state = _state(resolved)
    cached = as_object(None if again else _read_cache().get(str(resolved)))
    if cached.get("state") == state and isinstance(known := cached.get("sha256"), str):
        return known
    digest = _digest(resolved)
    if _state(resolved) == state:
        _remember(str(resolved), {"state": state, "sha256": digest})
    return digest


def files_sha256(paths: Sequence[str | os.PathLike[str]]) -> str:
    """The SHA-256 of a file; of several, that of their digests one after the other."""
    digests = [file_sha256(path) for path in paths]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def _state(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ino]


def _digest(path: Path) -> str:
    sha = hashlib.sha256()
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            sha.update(buffer[:count])
    return sha.hexdigest()


def _cache_file() -> Path:
    return cache_path("sha256.json")


def _read_cache() -> JsonObject:
    try:
        return as_object(load_json(_cache_file().read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        logger.debug("no cache of checksums: %s", error)
        return {}


def _remember(path: str, entry: dict[str, Any]) -> None:
    """Writes a new cache file and replaces the old one in one step."""
    target = _cache_file()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(target, overwrite=True) as part:
            part.write_text(json.dumps({**_read_cache(), path: entry}, indent=1), encoding="utf-8")
    except OSError as error:
        logger.debug("checksum not remembered: %s", error)
