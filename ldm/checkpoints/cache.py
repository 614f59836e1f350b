"""Weights on disk as a CPU multiplies them: the next process maps them, and packs nothing.

The folder is trusted as a program is, since its files describe memory to oneDNN: one that others can write to is
not used.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import stat
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ldm import __version__
from ldm.checkpoints.formats.detect import CheckpointError, reading
from ldm.checkpoints.formats.safetensors_file import read_safetensors
from ldm.checkpoints.formats.write import write_safetensors
from ldm.files import open_regular, without_leftovers, written_whole
from ldm.json_value import Json, load_json
from ldm.util import printable

logger = logging.getLogger(__name__)

_NAMES = r"[\w.-]+\.safetensors"
_ALIGNED = 64  # bytes: a line of the CPU's cache, which its kernels load at once
_DESCRIBED = "packed"  # of the metadata


def identity(files: Sequence[Path]) -> list[tuple[str, int, int, int]]:
    """Identifies the content of `files` without reading it: each file's path, size, time and inode.

    A file that is missing is a `CheckpointError`.
    """
    return [_identity(path) for path in files]


def _identity(path: Path) -> tuple[str, int, int, int]:
    with reading(path):
        state = os.stat(path)
        return str(path.resolve()), state.st_size, state.st_mtime_ns, state.st_ino


class PackedWeights:
    """The packed weights of a model's `files`, in a folder of their own below `folder`, one file for each weight.

    Its name is a hash of each file's path, size, time and inode, of what else the weights depend on (`choices`), and
    of this version, so that what is found there is never out of date. A full disk, or a folder that others can write
    to, costs the cache only.
    """

    def __init__(self, folder: Path, files: Sequence[Path], choices: Sequence[Json]) -> None:
        text = json.dumps([__version__, list(choices), identity(files)])
        self.folder = folder / hashlib.sha256(text.encode()).hexdigest()[:32]
        self._works, self._damaged = True, False
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            others = _others_that_write(self.folder)
        except OSError as error:
            self._fail(error)
            return
        if others:
            self._works = False
            logger.warning(
                "weights are not kept in %s: %s; choose another folder, or take that right from them",
                printable(folder),
                others,
            )

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def read(self, name: str) -> tuple[Json, list[Tensor]] | None:
        """Returns what was written under a name, with tensors that are views of the file; None if nothing was.

        A damaged file is removed.
        """
        path = self._file(name)
        if not self._works or not path.exists():
            return None
        try:
            # no tensors of inference mode, which `forget` leaves in memory
            with torch.inference_mode(False), reading(path), open_regular(path) as file:
                tensors, metadata = read_safetensors(file, use_mmap=True)
                return load_json(metadata[_DESCRIBED]), [tensors[str(i)] for i in range(len(tensors))]
        except (CheckpointError, LookupError, OSError, ValueError):
            self.remove(name)
            return None

    def write(self, name: str, described: Json, tensors: Sequence[Tensor]) -> None:
        """Keeps a packed weight, whole or not at all."""
        if not self._works:
            return
        path, held = self._file(name), {str(i): tensor for i, tensor in enumerate(tensors)}
        try:
            with without_leftovers(path, _NAMES), written_whole(path, overwrite=True) as part:
                write_safetensors(part, held, None, {_DESCRIBED: json.dumps(described)}, aligned=_ALIGNED)
        except OSError as error:
            self._fail(error)

    def remove(self, name: str) -> None:
        """Removes a file that is damaged."""
        path = self._file(name)
        level = logging.DEBUG if self._damaged else logging.WARNING
        logger.log(level, "%s is damaged: this weight is packed again", printable(path))
        self._damaged = True
        path.unlink(missing_ok=True)

    def _fail(self, error: OSError) -> None:
        self._works = False
        logger.warning("weights are not kept in %s: %s", printable(self.folder), error.strerror)


def _others_that_write(folder: Path) -> str:
    """Returns why other users can write to a folder; empty if they cannot, and on systems without owners of files."""
    if os.name != "posix":
        return ""
    state = folder.stat()
    if state.st_uid != os.geteuid():
        return "it belongs to another user"
    return "every user can write to it" if state.st_mode & stat.S_IWOTH else ""
