"""A run's claim on its image numbers, and everything that its pixels depend on, which --resume compares."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ldm.files import files_below, read_side_file
from ldm.job import Init
from ldm.places import find
from ldm.runs.description import Content, describe
from ldm.runs.model_cache import ModelCache
from ldm.runs.options import RunOptions
from ldm.runs.plan import Plan
from ldm.runs.processes import ProcessInfo
from ldm.runs.run_file import Page, RunFile, TileSides
from ldm.runs.run_folder import find_run, join_run, open_run
from ldm.util import InputError, printable

if TYPE_CHECKING:
    from ldm.checkpoints.adapters.lora_files import LoraFiles
    from ldm.images.canvas import Canvas
    from ldm.images.writer import RunFolder
    from ldm.runtime.device import Precision

_TABLES = ("vocab.json", "merges.txt", "tokenizer.json", "vocab.txt")  # of tokenizers
_SETTINGS = ("config.json", "adapter_config.json")  # of weights


@dataclass(frozen=True)
class Source:
    """The model, files and settings that a run's images depend on, besides its jobs."""

    config_path: Path
    config: Mapping[str, Any]
    ckpt: Path
    here: ProcessInfo
    precision: Precision
    canvases: Callable[[Init], Canvas]
    find_lora: LoraFiles
    cache: ModelCache


class Claim:
    """Reserves the image numbers of a run, or reopens those of the run being resumed.

    Rank 0 reserves; the others receive. `columns` are those of the grid.
    """

    def __init__(self, options: RunOptions, folder: RunFolder, plan: Plan, source: Source) -> None:
        self._options, self._folder, self._plan = options, folder, plan
        self.columns = min(options.n_rows if options.n_rows > 0 else options.n_samples, len(plan))
        self._here = source.here
        self._hashes = {} if self._here.rank else _hashes(options, source.ckpt)
        self._settings = settings(options, plan, source)
        self._run: RunFile | None = None

    @property
    def run(self) -> RunFile | None:
        """The run, once it has been claimed."""
        return self._run

    def take(self, tiles: TileSides | None = None) -> RunFile:
        """Claims and returns the run; the first call decides which. A new one notes the `tiles` that were chosen."""
        if self._run is None:
            made_from = self._made_from()
            if self._here.rank:
                self._run = join_run(self._folder, self._here.agree(), made_from)
            else:
                resume, numbers = self._options.resume, self._numbers()
                self._run = open_run(self._folder, made_from, *numbers, self._hashes, resume, tiles)
                if self._here.world > 1:
                    self._run.share()
                self._here.agree(self._run.first)
        return self._run

    def find(self) -> RunFile | None:
        """Returns the run that would be resumed, without a claim on it; None where the folder is empty."""
        return find_run(self._folder, self._made_from(), *self._numbers(), self._hashes)

    def _made_from(self) -> Content:
        return describe(self._plan[:], self._plan.batches(), {"columns": self.columns, **self._settings})

    def _numbers(self) -> tuple[int, dict[Page, int]]:
        """Returns the number of images, and of pages of each kind."""
        from ldm.images.grid import count_pages

        sizes = (job.upscaled_size for job in self._plan)
        pages: dict[Page, int] = {
            "grid": 0 if self._options.skip_grid else count_pages(sizes, self.columns),
            "sheet": sum(1 for _ in self._plan.sheets()),
        }
        return len(self._plan), pages


def settings(options: RunOptions, plan: Plan, source: Source) -> dict[str, Any]:
    """Returns the settings that pixels and files depend on besides jobs and weights: options and digests of files."""
    from ldm.checkpoints.adapters.lora_files import settings_file

    inits = dict.fromkeys(job.init for job in plan.kinds() if job.init is not None)
    pictures = dict.fromkeys(path for init in inits for path in (init.image, init.mask) if path)
    below = (
        files_below(options.embedding_dir, "the embedding folder")
        if options.embedding_dir is not None
        else []
    )
    embeddings = [*(Path(path) for path, _ in options.embedding), *below]
    loras = {name: source.find_lora(name) for name in plan.loras()}
    lora_settings = {name: file for name, path in loras.items() if (file := settings_file(path))}
    return {
        **{f.name: getattr(options, f.name) for f in fields(options) if f.metadata.get("compared")},
        "precision": source.precision.name,
        "device": source.here.device.type,
        "config": hashlib.sha256(source.config_path.read_bytes()).hexdigest(),
        "config_files": _digests(_config_files(source.config)),
        "classes": _foreign_classes(source.config),
        "vocabulary": _digests(_vocabulary(source.ckpt, options.text_encoder)),
        "safety_model": _digests(_safety_files(options)),
        "pictures": {
            printable(path): hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in pictures
        },
        "lora_files": {name: _digest(path) for name, path in loras.items()},
        "lora_settings": {name: _digest(path) for name, path in lora_settings.items()},
        "embeddings": _digests(embeddings),
        "embedding_names": _names(options.embedding),
    }


def _names(embeddings: Sequence[tuple[str, str | None]]) -> dict[str, str]:
    """Returns the name of each textual inversion that is not called by its file's name."""
    named: dict[str, list[str]] = {}
    for path, name in embeddings:
        if name is not None:
            named.setdefault(printable(path), []).append(name)
    return {path: ", ".join(names) for path, names in named.items()}


def _digests(files: list[Path]) -> dict[str, str]:
    return {printable(path): _digest(path) for path in files}


def _digest(path: Path) -> str:
    """Returns the SHA-256 of a side file; one larger than any valid one is refused unread."""
    from ldm.checkpoints.hashing import file_sha256

    small = path.name in (*_TABLES, *_SETTINGS)
    return hashlib.sha256(read_side_file(path)).hexdigest() if small else file_sha256(path)


def _config_files(config: Mapping[str, Any]) -> list[Path]:
    """Returns the files that a config names, such as the token tables of the text encoder's `version`."""
    from ldm.config import section
    from ldm.modules.encoders.bert import UNCASED, find_vocabulary

    found: list[Path] = []
    encoder = config.get("params", {}).get("cond_stage_config") or {}
    if str(encoder.get("target")).endswith(".BERTEmbedder"):
        found.append(find_vocabulary(section(config, "cond_stage_config").get("version", UNCASED)))
    for text in _texts(config):
        place = find(text)
        found += [path for path in (place, *(place / name for name in _TABLES)) if path.is_file()]
    return found


def _texts(node: Any) -> Iterator[str]:
    """Yields every text in a config that can be a path, without `ckpt_path`, which is never read."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            if key not in ("target", "ckpt_path"):
                yield from _texts(value)
    elif isinstance(node, list):
        for value in node:
            yield from _texts(value)
    elif isinstance(node, str) and 0 < len(node) <= 1000 and "\0" not in node:
        yield node


def _foreign_classes(config: Mapping[str, Any]) -> dict[str, str]:
    """Returns the digest of the source of each foreign package whose classes a config uses."""
    import importlib

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


def _vocabulary(ckpt: Path, text_encoder: str | None) -> list[Path]:
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


def _hashes(options: RunOptions, ckpt: Path) -> dict[str, Callable[[], str]]:
    """Returns the SHA-256 of the files of weights, computed in the background: large ones take seconds."""
    from ldm.checkpoints.hashing import files_sha256

    parts = files_by_part(options, ckpt).items()
    return {f"{part} hash": _in_background(files_sha256, files) for part, files in parts}


def files_by_part(options: RunOptions, ckpt: Path) -> dict[str, list[Path]]:
    """Returns the files of weights, by their names in the metadata."""
    from ldm.checkpoints.model_files import model_files

    files = {"Model": model_files(ckpt)}
    if options.vae is not None:
        files["VAE"] = model_files(options.vae, "vae")
    if options.text_encoder is not None:
        files["Text encoder"] = model_files(options.text_encoder, "text_encoder")
    return files


def _in_background(function: Callable[[list[Path]], str], paths: list[Path]) -> Callable[[], str]:
    """Starts `function(paths)` on a thread that never delays the end of the process; the call waits for it.

    The call raises errors of the thread; a file that cannot be read is an `InputError`.
    """
    results: list[str] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(function(paths))
        except BaseException as error:  # noqa: BLE001 - it is raised where the run can end in order
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()

    def result() -> str:
        thread.join()
        for error in errors:
            if isinstance(error, OSError):
                path = printable(error.filename or paths[0])
                raise InputError(f"{path} cannot be read: {error.strerror or printable(error)}") from error
            raise error
        return results[0]

    return result
