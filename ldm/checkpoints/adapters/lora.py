"""LoRA files: read safely, applied to a loaded model and removed again without a trace."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.checkpoints.adapters.lora_deltas import Parts, bias_change, weight_change
from ldm.checkpoints.adapters.lora_files import lora_file, settings_file
from ldm.checkpoints.adapters.lora_names import TEXT, flat_name, layers_by_name, other_kind, split_key
from ldm.checkpoints.formats.detect import CheckpointError, reading
from ldm.checkpoints.formats.read import Checkpoint, read_checkpoint
from ldm.checkpoints.layouts.recognise import SDXL, count_and_names, family_by_key
from ldm.files import read_side_file
from ldm.json_value import Json, JsonObject, as_object, load_json
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.util import InputError, printable

logger = logging.getLogger(__name__)

_COLUMNS = {1024: "Stable Diffusion 2", 2048: "SDXL"}  # of the text that cross-attention reads


@dataclass(frozen=True, slots=True)
class Lora:
    """The changes in a file: for each layer's path in the model the parts of its change."""

    path: Path
    layers: Mapping[str, Parts]


def read_lora(path: Path, names: Mapping[str, str], model: nn.Module) -> Lora:
    """The changes that a file makes to the layers of `model`, whose flat names `layers_by_name` gives.

    Keys that mean nothing here are counted and named in a warning. A file for another model, one whose parts do
    not fit, one that holds NaN or infinity, and kinds that are not supported are a `CheckpointError`.
    """
    checkpoint = read_checkpoint(path)
    _refuse_other_models(checkpoint)
    layers: dict[str, dict[str, Tensor]] = {}
    called: dict[str, str] = {}
    unknown: list[str] = []
    for key, tensor in checkpoint.state_dict.items():
        split = split_key(key)
        layer = names.get(flat_name(split.layer)) if split else None
        if split is None or layer is None:
            unknown.append(key)
            continue
        parts, called[layer] = layers.setdefault(layer, {}), split.layer
        if split.part in parts:
            raise _error(path, f"has {split.part} of {printable(split.layer[:200])} twice")
        parts[split.part] = tensor
    if not layers:
        raise _error(
            path, f"changes no layer of this model; its keys are {count_and_names(checkpoint.state_dict)}"
        )
    settings = _peft_settings(checkpoint)
    for layer, parts in layers.items():
        if settings and "down" in parts and "alpha" not in parts:
            parts["alpha"] = _peft_alpha(settings, called[layer], parts["down"], path)
        _check(path, layer, parts, model.get_submodule(layer))
    if unknown:
        logger.warning(
            "%s: ignored %s that fit no layer of this model", printable(path), count_and_names(unknown)
        )
    return Lora(path, layers)


def _refuse_other_models(checkpoint: Checkpoint) -> None:
    notes, keys = checkpoint.metadata, checkpoint.state_dict
    other = family_by_key(keys)
    if str(notes.get("ss_base_model_version")).startswith("sdxl"):
        other = other or SDXL
    if notes.get("ss_v2") == "True":
        other = other or "Stable Diffusion 2"
    if other:
        raise _error(checkpoint.path, f"is a LoRA for {other}, and this toolkit runs Stable Diffusion v1")
    kind = next(filter(None, map(other_kind, keys)), None)
    if kind is not None:
        raise _error(
            checkpoint.path, f"is of the kind {kind}, which is not supported; LoRA, LoHa and LoKr are"
        )


def _check(path: Path, layer: str, parts: Parts, module: nn.Module) -> None:
    """That the parts fit the layer, found out on shapes alone, and are finite."""
    shapes = {name: part if name == "alpha" else part.to("meta") for name, part in parts.items()}
    try:
        own = {name: parameter.to("meta") for name, parameter in module.named_parameters(recurse=False)}
        weight_change(shapes, own["weight"])
        bias_change(shapes, own.get("bias"))
    except ValueError as error:
        columns = parts["down"].shape[1] if "down" in parts and parts["down"].dim() > 1 else 0
        other = f": it is for {_COLUMNS[columns]}" if columns in _COLUMNS and ".attn2." in layer else ""
        raise _error(path, f"{layer} {error}{other}") from None
    for name, part in parts.items():
        if not torch.isfinite(part.float()).all():
            raise _error(path, f"{layer} has NaN or infinity in {name}; the file is damaged")


# --- alpha as PEFT writes it: in a JSON file next to it, or in the header -------------------------------------------


def _peft_settings(checkpoint: Checkpoint) -> JsonObject:
    text = checkpoint.metadata.get("lora_adapter_metadata")
    if text is None and (separate := settings_file(checkpoint.path)):
        with reading(separate):
            text = read_side_file(separate).decode("utf-8", "replace")
    settings: Json = {}
    if text is not None:
        with contextlib.suppress(ValueError):
            settings = None
            settings = load_json(str(text))
    if not isinstance(settings, dict):
        raise _error(checkpoint.path, "has settings of PEFT that cannot be read")
    kind = settings.get("peft_type", "LORA")
    if kind != "LORA" or settings.get("fan_in_fan_out"):
        what = f"of the kind {printable(kind)[:50]}" if kind != "LORA" else "for transposed weights"
        raise _error(checkpoint.path, f"is {what}, which is not supported")
    return settings


def _peft_alpha(settings: JsonObject, layer: str, down: Tensor, path: Path) -> Tensor:
    """The alpha that PEFT gave a layer, or its rank; with `use_rslora` PEFT divides by the root of the rank."""
    part = next((name for name in ("unet.", "text_encoder.") if layer.startswith(name)), "")
    alpha, pattern, stabilised = (
        settings.get(part + name, settings.get(name))
        for name in ("lora_alpha", "alpha_pattern", "use_rslora")
    )
    rank = down.shape[0] if down.dim() else 0
    exceptions = as_object(pattern).items()
    alpha = next((value for end, value in exceptions if f".{layer}".endswith(f".{end}")), alpha)
    if alpha is None:
        return torch.tensor(float(rank))
    if not isinstance(alpha, int | float) or isinstance(alpha, bool):
        raise _error(path, f"has the alpha {printable(alpha)[:50]!r} for {printable(layer[:200])}")
    return torch.tensor(alpha * rank**0.5 if stabilised else float(alpha))


# --- on the model ---------------------------------------------------------------------------------------------------


class LoraStack:
    """The LoRAs that a loaded model carries.

    Weights are never changed in place: a changed layer gets a new parameter, its own comes back when nothing
    changes it any more. So taking a LoRA off restores every bit, and whoever keeps something for a parameter
    (a packed or cast copy) sees another one. `find` gives the file that a name means; by default it is a path.
    """

    def __init__(self, model: LatentDiffusion, find: Callable[[str], Path] = lora_file):
        self._model, self._find = model, find
        self._files: dict[Path, Lora] = {}
        self._names: dict[str, str] = {}
        self._recipes: dict[str, list[tuple[Path, float]]] = {}
        self._own: dict[tuple[str, str], nn.Parameter] = {}

    def read(self, name: str) -> Lora:
        """The LoRA of a name, read and checked once."""
        path = self._find(name)
        if path not in self._files:
            self._names = self._names or layers_by_name(self._model)
            self._files[path] = read_lora(path, self._names, self._model)
        return self._files[path]

    def apply(self, loras: Sequence[tuple[str, float, float]]) -> bool:
        """Makes the model carry exactly these: name, U-Net weight, text weight. Only layers whose changes
        differ from those they carry are computed. Returns whether the text encoder has changed.
        """
        wanted: dict[str, list[tuple[Path, float]]] = {}
        for name, weight, text_weight in loras:
            lora = self.read(name)
            if not (math.isfinite(weight) and math.isfinite(text_weight)):
                raise InputError(
                    f"the LoRA {printable(name)} has the weight {weight:g}; give a finite number"
                )
            for layer in lora.layers:
                if multiplier := text_weight if layer.startswith(TEXT) else weight:
                    wanted.setdefault(layer, []).append((lora.path, multiplier))
        stale = [
            layer
            for layer in {**self._recipes, **wanted}
            if wanted.get(layer, []) != self._recipes.get(layer, [])
        ]
        for layer in stale:
            self._set(layer, wanted.get(layer, []))
        return any(layer.startswith(TEXT) for layer in stale)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _set(self, layer: str, recipe: Sequence[tuple[Path, float]]) -> None:
        """Gives a layer its own parameters plus the sum of the changes in `recipe`."""
        module = self._model.get_submodule(layer)
        parameters: dict[str, nn.Parameter] = {}
        changes = [(self._files[path].layers[layer], multiplier) for path, multiplier in recipe]
        for name, parameter in dict(module.named_parameters(recurse=False)).items():
            own = self._own.setdefault((layer, name), parameter)
            change = weight_change if name == "weight" else bias_change
            parts = (({key: part.to(own.device) for key, part in p.items()}, m) for p, m in changes)
            deltas = [m * delta for p, m in parts if (delta := change(p, own)) is not None]
            parameters[name] = _with(own, deltas) if deltas else own
        for name, parameter in parameters.items():
            setattr(module, name, parameter)
        self._recipes[layer] = list(recipe)


def _with(own: nn.Parameter, deltas: Iterable[Tensor]) -> nn.Parameter:
    """A new parameter, own + the sum of the deltas: of the same type and layout, and rounded once."""
    total = own.float()
    for delta in deltas:
        total = total + delta
    return nn.Parameter(torch.empty_like(own).copy_(total), requires_grad=own.requires_grad)


def _error(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{printable(path)}: {reason}")
