"""The hashes of a model file by which programs and sites name it."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

from ldm.checkpoints.adapters.lora_files import lora_hash
from ldm.checkpoints.formats.detect import open_regular, reading
from ldm.checkpoints.formats.safetensors_file import HASH_ENTRY, read_header
from ldm.checkpoints.formats.tensor_bytes import FileBytes
from ldm.checkpoints.hashing import file_sha256

_NOTED_HASHES = (HASH_ENTRY, "sshs_model_hash")  # of ModelSpec and of kohya's scripts
_OLD_HASH_START, _OLD_HASH_BYTES = 0x100000, 0x10000


def quick_hashes(path: Path, size: int) -> dict[str, str]:
    """Returns the hashes of a file of `size` bytes that need only a part of it."""
    return {"A1111, old": old_model_hash(path)} if size > _OLD_HASH_START else {}


def file_hashes(path: Path, size: int, format: str, part: str) -> dict[str, str]:
    """Returns all hashes of a file of `size` bytes, by name; `part` is that of its `ModelKind`."""
    digest = file_sha256(path, again=True)
    hashes = {"SHA-256": digest, "AutoV2": digest[:10], **quick_hashes(path, size)}
    if part == "LoRA":
        hashes["A1111, LoRA"] = lora_hash(path)
        if format == "safetensors":
            hashes["AutoV3"] = _weights_sha256(path)[:12]
    if part == "embedding":
        hashes["A1111, embedding"] = digest[:12]
    return hashes


def noted_hash_fits(path: Path, metadata: Mapping[str, object]) -> bool | None:
    """Returns whether a safetensors file's weights have the hash in its metadata; None if there is none."""
    noted = {str(metadata[name]).lower() for name in _NOTED_HASHES if metadata.get(name)}
    return {digest.removeprefix("0x") for digest in noted} == {_weights_sha256(path)} if noted else None


def old_model_hash(path: Path) -> str:
    """Returns the hash by the first rule of AUTOMATIC1111's web UI.

    It is 8 hex digits of the SHA-256 of 64 KiB after the first MiB.
    """
    with path.open("rb") as file:
        file.seek(_OLD_HASH_START)
        return sha256(file.read(_OLD_HASH_BYTES)).hexdigest()[:8]


def _weights_sha256(path: Path) -> str:
    """Returns the SHA-256 of what follows the header of a safetensors file."""
    with reading(path), open_regular(path) as file:
        content = FileBytes(file, use_mmap=True)
        _, start = read_header(content)
        return sha256(content.read(start, content.size - start)).hexdigest()
