"""Tar files of images and captions ("shards"), as the webdataset package writes them: for sets of very many images.

Files of a shard whose names are equal up to the first dot of the last part belong together: `000.jpg` and `000.txt`,
or `000.json` with a `caption` (https://github.com/webdataset/webdataset). A shard is not unpacked: an image is read
from its place in the file when it is needed.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ldm.finetuning.data import TEXT_COLUMNS, Example
from ldm.images.source import EXTENSIONS
from ldm.job import MemoryImage
from ldm.util import InputError, is_mapping, printable

_MAX_TEXT = 2**20  # bytes


class InShard(MemoryImage):
    """An image inside of a tar file, whose bytes are read each time that they are asked for."""

    _place: tuple[Path, int, int]  # file, first byte, number of bytes

    @classmethod
    def at(cls, shard: Path, name: str, first: int, count: int) -> InShard:
        """Returns the image called `name`, of `count` bytes from `first` in the file."""
        image = str.__new__(cls, shard / name)
        image._place = shard, first, count
        return image

    @property
    def data(self) -> bytes:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The bytes of the image."""
        path, first, count = self._place
        with path.open("rb") as file:
            file.seek(first)
            return file.read(count)


def read_shard(shard: Path, defaults: Example) -> Iterator[Example]:
    """Yields the images of a tar file with their captions, in their order; damage is an `InputError`."""
    try:
        with tarfile.open(shard, "r:") as tar:
            image: tuple[str, tarfile.TarInfo] | None = None
            caption, last = "", None
            for member in tar:
                if not member.isfile():
                    continue
                key, ending = _divided(member.name)
                if key != last:
                    if image is not None:
                        yield _example(shard, *image, caption, defaults)
                    image, caption, last = None, "", key
                if f".{ending}" in EXTENSIONS:
                    image = key, member
                elif ending in ("txt", "json") and member.size <= _MAX_TEXT:
                    file = tar.extractfile(member)
                    caption = _caption(b"" if file is None else file.read(), ending) or caption
            if image is not None:
                yield _example(shard, *image, caption, defaults)
    except tarfile.TarError as error:
        raise InputError(
            f"{printable(shard)} is not a plain tar file ({printable(error)}); unpack a compressed one first"
        ) from None
    except OSError as error:
        raise InputError(f"{printable(shard)} cannot be read: {error.strerror}") from None


def _divided(name: str) -> tuple[str, str]:
    """Returns the name up to the first dot of its last part, and the rest in lower case."""
    folder, slash, last = name.rpartition("/")
    stem, _, ending = last.partition(".")
    return f"{folder}{slash}{stem}", ending.lower()


def _example(shard: Path, key: str, member: tarfile.TarInfo, caption: str, defaults: Example) -> Example:
    image = InShard.at(shard, member.name, member.offset_data, member.size)
    return replace(defaults, path=shard / key, member=image, caption=caption or defaults.caption)


def _caption(data: bytes, ending: str) -> str:
    text = data.decode("utf-8-sig", "replace")
    if ending == "txt":
        return text.strip()
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        return ""
    values = (row.get(name) for name in TEXT_COLUMNS) if is_mapping(row) else ()
    return next((value.strip() for value in values if isinstance(value, str)), "")
