"""Describes a model file, without running anything from it and without trusting it: also of refused files."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ldm.checkpoints.adapters.control import network_of, read_control
from ldm.checkpoints.few_steps import made_for
from ldm.checkpoints.formats.detect import CheckpointError, file_size, open_regular, reading, sniff
from ldm.checkpoints.formats.embedding_image import is_png
from ldm.checkpoints.formats.imports import imports_of
from ldm.checkpoints.formats.pickle_reader import is_known
from ldm.checkpoints.formats.read import find_damaged_records, find_not_finite, read_checkpoint, read_tree
from ldm.checkpoints.inspection_hashes import file_hashes, noted_hash_fits, quick_hashes
from ldm.checkpoints.inspection_text import amount
from ldm.checkpoints.layouts.prediction import config_beside, stated_prediction
from ldm.checkpoints.layouts.published import PUBLISHED
from ldm.checkpoints.layouts.recognise import COMPVIS_PREFIXES, ModelKind, kind_of, tensors_in
from ldm.checkpoints.load import build_model, check_fit, has_averages, load_into, only_averages
from ldm.checkpoints.model_files import model_files, read_model
from ldm.checkpoints.variants import adapted
from ldm.models.keys import EMA_PREFIX
from ldm.scaled import stored_type
from ldm.util import printable

ConfigFor = Callable[[ModelKind], Mapping[str, Any] | None]

UNKNOWN = ModelKind("")
_FOLDER = "diffusers folder"
_LONGEST_VALUE = 300
_MOST_ENTRIES = 100

# whose weights a key names, whatever the file is as a whole
_PARTS = {
    EMA_PREFIX: "EMA",
    **{prefix: part for part, prefix in COMPVIS_PREFIXES.items()},
    "conditioner.": "text encoder",
    "control_model.": "ControlNet",
    "lora_unet_": "U-Net",
    "unet.": "U-Net",
    "lora_te": "text encoder",
    "te_": "text encoder",
    "te1_": "text encoder",
    "text_encoder": "text encoder",
    "clip_l.": "text encoder",
}


@dataclass(frozen=True, slots=True)
class Inspection:
    """The findings on a file, or on a diffusers folder as a whole.

    `refused` is why the reader does not take the file. `parameters` and `precisions` count numbers, by the part
    of the model and by type. `fits` is whether the model of a config takes the weights (None: nothing to compare
    with), `problem` why not, `unexpected` which keys it has no place for. `prediction` is the prediction type that a
    file states, if it is not the noise, `variants` how its model differs from the config, `made_for` the few steps
    that it was distilled to and a command that suits. `imports` is what pickles ask for, `foreign` the part of it
    that the reader refuses. `damaged` names records and weights. `noted_hash_fits`
    is whether the SHA-256 of the weights is the one in the metadata (None: there is none, or it was not computed);
    tools that change weights may keep an old one, so that alone is not damage. Text from the file is cut and escaped.
    """

    path: str
    size: int
    format: str = ""
    refused: str = ""
    kind: ModelKind = UNKNOWN
    tensors: int = 0
    parameters: Mapping[str, int] = field(default_factory=dict[str, int])
    precisions: Mapping[str, int] = field(default_factory=dict[str, int])
    ema: bool = False
    only_ema: bool = False
    global_step: int | None = None
    fits: bool | None = None
    problem: str = ""
    unexpected: tuple[str, ...] = ()
    prediction: str = ""
    variants: tuple[str, ...] = ()
    made_for: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    imports: tuple[str, ...] = ()
    foreign: tuple[str, ...] = ()
    checked: bool = False
    damaged: tuple[str, ...] = ()
    noted_hash_fits: bool | None = None
    hashes: Mapping[str, str] = field(default_factory=dict[str, str])
    published: str = ""

    @property
    def sound(self) -> bool:
        """Whether the file is read and not damaged, and fits the model if there is one."""
        return not (self.refused or self.damaged) and self.fits is not False

    def as_json(self) -> dict[str, Any]:
        """All of it, for `json.dumps`."""
        return {**asdict(self), "kind": {"name": self.kind.name, **asdict(self.kind)}}


@dataclass(frozen=True, slots=True)
class _Content:
    """The content of a file as it is read: tensors by key, other values by name."""

    format: str
    tensors: Mapping[str, torch.Tensor]
    values: Mapping[str, Any]


def inspect_path(
    path: str | os.PathLike[str],
    deep: bool = True,
    config_for: ConfigFor = lambda kind: None,
    report: Callable[[str], None] = lambda text: None,
) -> list[Inspection]:
    """Inspects a file; of a diffusers folder the whole, then each of its weights files.

    With `deep` every byte is read, for checksums and damage, and `report` is called before something that takes
    time. `config_for` gives the checked config whose model the weights should fit, or None; of a folder only the
    whole is compared with it. A path that cannot be read at all is a `CheckpointError`; one that the reader refuses
    is an answer.
    """
    if not os.path.isdir(path):
        return [_inspect_file(Path(path), deep, config_for, report)]
    files = [_inspect_file(file, deep, lambda kind: None, report) for file in model_files(path)]
    return [_inspect_folder(Path(path), files, config_for), *files]


def _inspect_file(
    path: Path,
    deep: bool,
    config_for: ConfigFor,
    report: Callable[[str], None],
) -> Inspection:
    with reading(path), open_regular(path) as file:
        imports = tuple(_short(name) for name in imports_of(file))
        found = Inspection(printable(path), file_size(file), imports=imports)
    found = replace(found, foreign=tuple(name for name in imports if not is_known(name)))
    try:
        content = _read(path)
    except CheckpointError as error:
        found = replace(found, format=_format(path), refused=str(error))
    else:
        entries = {**content.values, **config_beside(path)}
        prediction = stated_prediction(content.tensors, entries)
        found = replace(
            _describe(found, content), prediction=prediction.stated, made_for=_made_for(path, content)
        )
        if prediction.foreign:
            found = replace(found, fits=False, problem=f"was trained for {prediction.foreign}")
        found = _compare(found, path, config_for)
        found = _check(found, path, content, report) if deep else found
    if not deep:
        return replace(found, hashes=quick_hashes(path, found.size))
    report(f"computing the checksum of {found.path} ({amount(found.size)})")
    hashes = file_hashes(path, found.size, found.format, found.kind.part)
    return replace(found, hashes=hashes, published=PUBLISHED.get(hashes["SHA-256"], ""))


def _read(path: Path) -> _Content:
    """A state dict, or else tensors elsewhere in the file: an embedding has them among other values."""
    try:
        read = read_checkpoint(path)
        return _Content(read.format, read.state_dict, read.metadata)
    except CheckpointError:
        tree = read_tree(path)
        values = dict(tensors_in(tree)) if isinstance(tree, dict) else {}
        tensors = {key: value for key, value in values.items() if isinstance(value, torch.Tensor)}
        if not tensors or kind_of(tensors) == UNKNOWN:
            raise
        return _Content(_format(path), tensors, values)


def _format(path: Path) -> str:
    try:
        with reading(path), open_regular(path) as file:
            return "PNG" if is_png(file) else sniff(file)
    except CheckpointError:
        return ""


def _describe(found: Inspection, content: _Content) -> Inspection:
    kind = kind_of(content.tensors)
    parameters: Counter[str] = Counter()
    precisions: Counter[str] = Counter()
    for key, tensor in content.tensors.items():
        parameters[_part(key, kind)] += tensor.numel()
        precisions[str(stored_type(tensor)).removeprefix("torch.")] += tensor.numel()
    step = content.values.get("global_step", content.values.get("step"))
    return replace(
        found,
        format=content.format,
        kind=kind,
        tensors=len(content.tensors),
        parameters=dict(parameters.most_common()),
        precisions=dict(precisions.most_common()),
        ema=has_averages(content.tensors),
        only_ema=only_averages(content.tensors),
        global_step=step if type(step) is int else None,
        metadata=_metadata(content.values),
    )


def _made_for(path: Path, content: _Content) -> str:
    guided = any(key.endswith("time_embedding.cond_proj.weight") for key in content.tensors)
    kind = made_for(path, content.values, guided)
    return "" if kind is None else str(kind)


def _part(key: str, kind: ModelKind) -> str:
    named = next((part for prefix, part in _PARTS.items() if key.startswith(prefix)), None)
    return named or (kind.part if kind.part not in ("", "model", "LoRA") else "other")


def _metadata(values: Mapping[str, Any]) -> dict[str, str]:
    plain = [(key, value) for key, value in values.items() if isinstance(value, (str, int, float))]
    return {_short(key): _short(value) for key, value in plain[:_MOST_ENTRIES]}


def _short(value: object) -> str:
    text = str(value)
    more = f"... ({len(text):,} characters)" if len(text) > _LONGEST_VALUE else ""
    return printable(text[:_LONGEST_VALUE]) + more


def _compare(found: Inspection, path: Path, config_for: ConfigFor) -> Inspection:
    """With the answers of the code that loads models; it looks at keys and shapes, and reads no weights."""
    config = config_for(found.kind)
    if config is None:
        return found
    if found.kind.part in ("ControlNet", "T2I-Adapter", "IP-Adapter"):
        return _compare_control(found, path, config)
    try:
        checkpoint = read_model(path)
        config, variants = adapted(config, checkpoint)
        found = replace(found, variants=tuple(variants))
        model = build_model(config)
        check_fit(model, checkpoint)
        unexpected = load_into(model, checkpoint).unknown
    except CheckpointError as error:
        return replace(found, fits=False, problem=str(error))
    return replace(found, fits=True, unexpected=tuple(map(_short, unexpected)))


def _compare_control(found: Inspection, path: Path, config: Mapping[str, Any]) -> Inspection:
    try:
        network_of(read_control(path), build_model(config).model.diffusion_model)
    except CheckpointError as error:
        return replace(found, fits=False, problem=str(error))
    return replace(found, fits=True)


def _check(found: Inspection, path: Path, content: _Content, report: Callable[[str], None]) -> Inspection:
    report(f"looking for damage in {found.path} ({amount(found.size)})")
    damaged = find_damaged_records(path) or find_not_finite(content.tensors)
    fits = noted_hash_fits(path, content.values) if content.format == "safetensors" else None
    return replace(found, checked=True, damaged=tuple(map(_short, damaged)), noted_hash_fits=fits)


def _inspect_folder(path: Path, files: Sequence[Inspection], config_for: ConfigFor) -> Inspection:
    """The sum of the files of a folder's components, and whether the whole fits."""
    unets = [file.kind for file in files if file.kind.part == "U-Net"]
    kind = replace(unets[0], part="model") if unets and len(files) > 1 else files[0].kind
    found = Inspection(
        printable(path),
        sum(file.size for file in files),
        _FOLDER,
        "; ".join(file.refused for file in files if file.refused),
        kind,
        sum(file.tensors for file in files),
        dict(sum((Counter(file.parameters) for file in files), Counter[str]())),
        dict(sum((Counter(file.precisions) for file in files), Counter[str]())),
        checked=all(file.checked for file in files),
        damaged=tuple(f"{file.path}: {name}" for file in files for name in file.damaged),
    )
    if found.refused:
        return found
    return _compare(replace(found, prediction=read_model(path).prediction.stated), path, config_for)
