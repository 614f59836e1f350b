"""Where a LoRA's file lies, and what others know it by."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache
from hashlib import sha256
from pathlib import Path

from ldm.checkpoints.hashing import file_sha256
from ldm.checkpoints.safetensors_file import read_header
from ldm.checkpoints.sniff import open_regular, reading, sniff
from ldm.checkpoints.tensor_bytes import FileBytes
from ldm.job import MODEL_ENDINGS, lora_name
from ldm.util import InputError, printable

PEFT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
PEFT_SETTINGS = "adapter_config.json"
_HASH_DIGITS = 12
_NAMED = 5


def lora_file(path: str | Path) -> Path:
    """The file that `path` is, or that the folder which PEFT saved holds; an `InputError` where there is none."""
    path = Path(path)
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

    A name is a file's name without its ending. A given file that is not there may lie below the folder, and below
    the folder the folders that a file lies in may stand before its name (`styles/ink`), which tells equal names
    apart. No name leads to another file.
    """

    def __init__(self, files: Sequence[str | Path] = (), folder: str | Path | None = None):
        self._folder = folder if folder is None else Path(folder)
        if self._folder is not None and not self._folder.is_dir():
            raise InputError(f"the LoRA folder {printable(folder)} does not exist")
        self._given: dict[str, Path] = {}
        for path in map(Path, files):
            name = lora_name(path.name)
            if self._given.setdefault(name, path) != path:
                raise InputError(f"two LoRA files are named {printable(name)}; rename one of them")

    def __call__(self, name: str) -> Path:
        """The file of a name; none, or several, are an `InputError`."""
        given, found = self._given.get(name), self._below.get(name, [])
        if given is not None and (given.exists() or not found):
            return lora_file(given)
        if len(found) == 1:
            return found[0]
        if not found:
            where = "" if self._folder is None else f" below {printable(self._folder)}"
            raise InputError(f"there is no LoRA named {printable(name)}{where}; give its file with --lora")
        choice = ", ".join(printable(self._long_name(file)) for file in found[:_NAMED])
        raise InputError(f"there are {len(found)} LoRA files named {printable(name)}; say one of {choice}")

    @cached_property
    def _below(self) -> dict[str, list[Path]]:
        """Every file below the folder, by its name and by its name with folders."""
        by_name: dict[str, list[Path]] = {}
        for file in sorted(self._folder.rglob("*")) if self._folder is not None else []:
            if file.name.endswith(MODEL_ENDINGS) and file.is_file():
                for name in {lora_name(file.name), self._long_name(file)}:
                    by_name.setdefault(name, []).append(file)
        return by_name

    def _long_name(self, file: Path) -> str:
        assert self._folder is not None
        return lora_name(file.relative_to(self._folder).as_posix())


@lru_cache(maxsize=64)
def lora_hash(path: Path) -> str:
    """What AUTOMATIC1111's web UI knows a LoRA by: its own note of its weights, or their SHA-256, 12 hex digits."""
    with reading(path), open_regular(path) as file:
        if sniff(file) != "safetensors":
            return file_sha256(path)[:_HASH_DIGITS]
        content = FileBytes(file, use_mmap=True)
        header, start = read_header(content)
        noted = header.get("__metadata__", {}).get("sshs_model_hash")
        digest = str(noted) if noted else sha256(content.read(start, content.size - start)).hexdigest()
        return digest[:_HASH_DIGITS]
