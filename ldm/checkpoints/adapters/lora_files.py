"""Finds LoRA files by name, and computes the hash that other programs know them by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from hashlib import sha256
from pathlib import Path

from ldm.checkpoints.formats.detect import CheckpointError, open_regular, reading, sniff
from ldm.checkpoints.formats.safetensors_file import read_header
from ldm.checkpoints.formats.tensor_bytes import FileBytes
from ldm.checkpoints.hashing import file_sha256
from ldm.files import files_below
from ldm.job import MODEL_ENDINGS, lora_name
from ldm.json_value import as_object
from ldm.places import find
from ldm.util import InputError, printable

PEFT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
PEFT_SETTINGS = "adapter_config.json"
_HASH_DIGITS = 12
_NAMED = 5


def lora_file(path: str | Path) -> Path:
    """The file that `path` is, or that the folder which PEFT saved holds; an `InputError` where there is none."""
    path = find(path)
    found = next((file for name in PEFT_FILES if (file := path / name).is_file()), path)
    if not found.is_file():
        raise InputError(
            f"the LoRA {printable(path)} does not exist; give a file, or a folder that PEFT saved"
        )
    return found


def settings_file(file: Path) -> Path | None:
    """The settings that PEFT wrote alongside the weights in `file`, which they depend on; None where it did not."""
    settings = file.with_name(PEFT_SETTINGS)
    return settings if file.name in PEFT_FILES and settings.is_file() else None


class LoraFiles:
    """Finds files by the names that prompts call them by: `files` that were given, then those below `folder`.

    A name is a file's name without its ending, or else with it, or else the name of the training's output that
    kohya's scripts note in the file (that of a given file first), as in AUTOMATIC1111's web UI. A given file that is
    not there may be below the folder. Below the folder, a name may begin with the folders that the file is in
    (`styles/ink`), which distinguishes equal names. No name leads to another file.
    """

    def __init__(self, files: Sequence[str | Path] = (), folder: str | Path | None = None):
        self._folder = folder if folder is None else Path(folder)
        below = files_below(self._folder, "the LoRA folder") if self._folder is not None else []
        self._files = [file for file in below if file.name.endswith(MODEL_ENDINGS)]
        self._given: dict[str, Path] = {}
        for path in map(find, files):
            name = lora_name(path.name)
            if self._given.setdefault(name, path) != path:
                raise InputError(f"two LoRA files are named {printable(name)}; rename one of them")

    def __call__(self, name: str) -> Path:
        """The file of a name; none, or several, are an `InputError`."""
        given = next((path for stem, path in self._given.items() if name in (stem, path.name)), None)
        found = self._below.get(name) or self._with_endings.get(name) or []
        if given is not None and (given.exists() or not found):
            return lora_file(given)
        if not found and (trained := self._given_trained_as.get(name)):
            if len(trained) > 1:
                raise _several(name, [lora_name(path.name) for path in trained])
            return lora_file(trained[0])
        found = found or self._trained_as.get(name, [])
        if len(found) == 1:
            return found[0]
        if not found:
            where = "" if self._folder is None else f" below {printable(self._folder)}"
            raise InputError(f"there is no LoRA named {printable(name)}{where}; give its file with --lora")
        names = list(map(self._long_name, found))
        if len(set(names)) < len(names):
            names = list(map(self._path_below, found))
        raise _several(name, names)

    @cached_property
    def _below(self) -> dict[str, list[Path]]:
        """Every file below the folder, by its name and by its name with folders."""
        return _by_name((file, {lora_name(file.name), self._long_name(file)}) for file in self._files)

    @cached_property
    def _with_endings(self) -> dict[str, list[Path]]:
        return _by_name((file, {file.name, self._path_below(file)}) for file in self._files)

    @cached_property
    def _trained_as(self) -> dict[str, list[Path]]:
        return _by_name((file, {output_name(file)} - {""}) for file in self._files)

    @cached_property
    def _given_trained_as(self) -> dict[str, list[Path]]:
        there = [path for path in self._given.values() if path.exists()]
        return _by_name((path, {output_name(lora_file(path))} - {""}) for path in there)

    def _path_below(self, file: Path) -> str:
        assert self._folder is not None
        return file.relative_to(self._folder).as_posix()

    def _long_name(self, file: Path) -> str:
        return lora_name(self._path_below(file))


def _by_name(named: Iterable[tuple[Path, set[str]]]) -> dict[str, list[Path]]:
    by_name: dict[str, list[Path]] = {}
    for file, names in named:
        for name in names:
            by_name.setdefault(name, []).append(file)
    return by_name


def _several(name: str, names: Sequence[str]) -> InputError:
    choice = ", ".join(map(printable, names[:_NAMED]))
    return InputError(f"there are {len(names)} LoRA files named {printable(name)}; use one of {choice}")


def output_name(path: Path) -> str:
    """The name of the training's output that kohya's scripts write into a file; empty without one."""
    return str(notes_in(path).get("ss_output_name", ""))


def notes_in(path: Path) -> Mapping[str, object]:
    """The metadata of a safetensors file; none of any other."""
    try:
        with reading(path), open_regular(path) as file:
            if sniff(file) != "safetensors":
                return {}
            header, _ = read_header(FileBytes(file, use_mmap=True))
            return as_object(header.get("__metadata__"))
    except CheckpointError:  # another file of the folder than the one that is looked for, perhaps
        return {}


@lru_cache(maxsize=64)
def lora_hash(path: Path) -> str:
    """AUTOMATIC1111's hash of a LoRA, 12 hex digits: as noted in it, or its weights' SHA-256."""
    with reading(path), open_regular(path) as file:
        if sniff(file) != "safetensors":
            return file_sha256(path)[:_HASH_DIGITS]
        content = FileBytes(file, use_mmap=True)
        header, start = read_header(content)
        noted = as_object(header.get("__metadata__")).get("sshs_model_hash")
        digest = str(noted) if noted else sha256(content.read(start, content.size - start)).hexdigest()
        return digest[:_HASH_DIGITS]
