"""Everything that the pixels of a run depend on, besides its jobs and weights: --resume compares it."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

from ldm.files import files_below, read_side_file
from ldm.places import find
from ldm.runs.options import RunOptions
from ldm.runs.plan import Plan
from ldm.runs.source import Source
from ldm.util import is_list, is_mapping, printable

_TABLES = ("vocab.json", "merges.txt", "tokenizer.json", "vocab.txt")  # of tokenizers
_SETTINGS = ("config.json", "adapter_config.json")  # of weights


def settings(options: RunOptions, plan: Plan, source: Source) -> dict[str, Any]:
    """Returns the settings that pixels and files depend on besides jobs and weights: options and digests of files."""
    from ldm.checkpoints.adapters.control import control_file, control_parts
    from ldm.checkpoints.adapters.lora_files import settings_file
    from ldm.checkpoints.hashing import files_sha256
    from ldm.checkpoints.image_encoder import encoder_hash

    inits = dict.fromkeys(job.init for job in plan.kinds() if job.init is not None)
    images = dict.fromkeys(path for init in inits for path in (init.image, init.mask) if path)
    images |= dict.fromkeys(image for job in plan.kinds() for _, image, *_ in job.controls)
    below = (
        files_below(options.embedding_dir, "the embedding folder")
        if options.embedding_dir is not None
        else []
    )
    embeddings = [*(Path(path) for path, _ in options.embedding), *below]
    controls = {name: files_sha256(control_parts(control_file(name))) for name in plan.controls()}
    encoders = {name: digest for name in plan.controls() if (digest := encoder_hash(control_file(name)))}
    loras = {name: source.find_lora(name) for name in plan.loras()}
    lora_settings = {name: file for name, path in loras.items() if (file := settings_file(path))}
    return {
        **{f.name: getattr(options, f.name) for f in fields(options) if f.metadata.get("compared")},
        "precision": source.precision.name,
        "device": source.here.device.type,
        "config": hashlib.sha256(source.config_path.read_bytes()).hexdigest(),
        "config_files": file_digests(_config_files(source.config)),
        "classes": foreign_classes(source.config),
        "vocabulary": file_digests(vocabulary_files(source.ckpt, options.text_encoder)),
        "safety_model": file_digests(_safety_files(options)),
        "pictures": {printable(path): hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in images},
        **({"control_files": controls} if controls else {}),  # runs from before there were any lack them
        **({"image_encoders": encoders} if encoders else {}),
        "lora_files": {name: file_digest(path) for name, path in loras.items()},
        "lora_settings": {name: file_digest(path) for name, path in lora_settings.items()},
        "embeddings": file_digests(embeddings),
        "embedding_names": _names(options.embedding),
    }


def _names(embeddings: Sequence[tuple[str, str | None]]) -> dict[str, str]:
    """Returns the name of each textual inversion that is not called by its file's name."""
    named: dict[str, list[str]] = {}
    for path, name in embeddings:
        if name is not None:
            named.setdefault(printable(path), []).append(name)
    return {path: ", ".join(names) for path, names in named.items()}


def file_digests(files: list[Path]) -> dict[str, str]:
    return {printable(path): file_digest(path) for path in files}


def file_digest(path: Path) -> str:
    """Returns the SHA-256 of a side file; one larger than any valid one is refused unread."""
    from ldm.checkpoints.hashing import file_sha256

    small = path.name in (*_TABLES, *_SETTINGS)
    return hashlib.sha256(read_side_file(path)).hexdigest() if small else file_sha256(path)


def _config_files(config: Mapping[str, Any]) -> list[Path]:
    """Returns the files that a config names, such as the token tables of the text encoder's `version`."""
    from ldm.config import section
    from ldm.modules.encoders.bert import UNCASED, find_vocabulary

    found: list[Path] = []
    encoder: Any = config.get("params", {}).get("cond_stage_config") or {}
    if str(encoder.get("target")).endswith(".BERTEmbedder"):
        found.append(find_vocabulary(section(config, "cond_stage_config").get("version", UNCASED)))
    for text in _texts(config):
        place = find(text)
        found += [path for path in (place, *(place / name for name in _TABLES)) if path.is_file()]
    return found


def _texts(node: Any) -> Iterator[str]:
    """Yields every text in a config that can be a path, without `ckpt_path`, which is never read."""
    if is_mapping(node):
        for key, value in node.items():
            if key not in ("target", "ckpt_path"):
                yield from _texts(value)
    elif is_list(node):
        for value in node:
            yield from _texts(value)
    elif isinstance(node, str) and 0 < len(node) <= 1000 and "\0" not in node:
        yield node


def foreign_classes(config: Mapping[str, Any]) -> dict[str, str]:
    """Returns the digest of the source of each foreign package whose classes a config uses."""
    from ldm.config import targets

    packages = dict.fromkeys(target.partition(".")[0] for target in targets(config))
    return {
        name: _source_digest(importlib.import_module(name))
        for name in packages
        if name not in ("ldm", "torch")
    }


def _source_digest(package: ModuleType) -> str:
    """Returns the SHA-256 of the source of a module, or of a package's modules in the order of their names."""
    files = [Path(package.__file__)] if package.__file__ else []
    for folder in getattr(package, "__path__", []):
        files += sorted(Path(folder).rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def vocabulary_files(ckpt: Path, text_encoder: str | None) -> list[Path]:
    """Returns the token tables in a folder of weights."""
    from ldm.checkpoints.model_files import vocabulary_folder

    folder = vocabulary_folder(ckpt, text_encoder)
    return [] if folder is None else [path for name in _TABLES if (path := folder / name).is_file()]


def _safety_files(options: RunOptions) -> list[Path]:
    from ldm.safety.load import find_safety_model

    weights = None if options.safety == "off" else find_safety_model(options.safety_model)
    if weights is None:
        return []
    return [path for path in (weights, weights.with_name("config.json")) if path.is_file()]
