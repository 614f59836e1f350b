"""Loads a checkpoint into a model: strict about keys and shapes, without a second copy of the weights."""

from __future__ import annotations

import logging
from collections.abc import Collection, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ldm.checkpoints.formats.detect import CheckpointError, reading
from ldm.checkpoints.formats.read import Checkpoint
from ldm.checkpoints.formats.tensor_bytes import FLOAT8
from ldm.checkpoints.layouts.names import PREFIXES, WORDS, parts_in
from ldm.checkpoints.layouts.prediction import check_prediction, check_schedule, is_mark
from ldm.checkpoints.layouts.recognise import (
    LONG_POSITIONS,
    V1,
    Part,
    count_and_names,
    ema_key,
    looks_like,
)
from ldm.checkpoints.layouts.settings import component_configs
from ldm.checkpoints.model_files import read_json
from ldm.config import ConfigError
from ldm.json_value import as_list, as_object
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.keys import EMA_PREFIX, FIRST_STAGE_PREFIX
from ldm.modules.encoders.modules import FrozenCLIPEmbedder
from ldm.modules.encoders.tokenizer import CLIPTokenizer
from ldm.util import InputError, instantiate_from_config, printable

logger = logging.getLogger(__name__)

Ema = Literal["auto", "on", "off"]

# Computed from the config by the model itself, in float64 and rounded once: the file's copy is not needed.
SCHEDULE_BUFFERS = frozenset(
    {
        "betas",
        "alphas_cumprod",
        "alphas_cumprod_prev",
        "sqrt_alphas_cumprod",
        "sqrt_one_minus_alphas_cumprod",
        "log_one_minus_alphas_cumprod",
        "sqrt_recip_alphas_cumprod",
        "sqrt_recipm1_alphas_cumprod",
        "posterior_variance",
        "posterior_log_variance_clipped",
        "posterior_mean_coef1",
        "posterior_mean_coef2",
    }
)
EMA_COUNTERS = frozenset({f"{EMA_PREFIX}decay", f"{EMA_PREFIX}num_updates"})
_HARMLESS_PREFIXES = (EMA_PREFIX, f"{FIRST_STAGE_PREFIX}loss.")
_POSITIONS = f"{PREFIXES['text_encoder']}transformer.text_model.embeddings.position_embedding.weight"
_USES: Mapping[Part, str] = {
    "ControlNet": "give it with --control FILE:IMAGE, and a model with --ckpt",
    "T2I-Adapter": "give it with --control FILE:IMAGE, and a model with --ckpt",
    "LoRA": "give it with --lora, and a model with --ckpt",
    "embedding": "give it with --embedding, and a model with --ckpt",
}
_NO_USE = "this toolkit has no use for it: give a Stable Diffusion v1 model"


@dataclass(frozen=True, slots=True)
class LoadReport:
    """The result of `load_into`.

    `weights` is which of a file's two sets of U-Net weights is in use; `computed` are the keys whose own
    values the model kept, `ignored` are harmless leftovers of the file, `unknown` its other leftovers,
    `cast_from` the types that were converted.
    """

    weights: Literal["ema", "plain"]
    computed: tuple[str, ...]
    ignored: tuple[str, ...]
    unknown: tuple[str, ...]
    cast_from: tuple[torch.dtype, ...]


def _keep(layer: nn.Module) -> None:
    """Leaves a layer's parameters as they are."""


@contextmanager
def skip_init() -> Generator[None]:
    """Skips the initialisation of linear, convolution, embedding and norm layers that are built inside the block.

    It takes seconds for the layers of v1, even on the meta device. While the block runs, `reset_parameters` of these
    torch classes does nothing in the whole process: do not build other models in other threads meanwhile.
    """
    kinds: tuple[Any, ...] = (nn.Linear, nn.Conv2d, nn.Embedding, nn.LayerNorm, nn.GroupNorm)
    initialisers = [kind.reset_parameters for kind in kinds]
    try:
        for kind in kinds:
            kind.reset_parameters = _keep
        yield
    finally:
        for kind, initialise in zip(kinds, initialisers, strict=True):
            kind.reset_parameters = initialise


def build_model(config: Mapping[str, Any]) -> LatentDiffusion:
    """The model of a checked config on the meta device: without memory for weights, its schedule computed."""
    try:
        with torch.device("meta"), skip_init():
            model = instantiate_from_config(config)
    except InputError:
        raise
    except Exception as error:  # whatever a wrong value leads to, the config is at fault
        reason = printable(f"{type(error).__name__}: {error}")
        raise ConfigError(f"the config describes no model that can be built: {reason}") from error
    if not isinstance(model, LatentDiffusion):
        raise ConfigError(f"the config's model {config['target']} is not a LatentDiffusion")
    return model


def check_fit(model: LatentDiffusion, checkpoint: Checkpoint) -> None:
    """That a checkpoint predicts the noise or v, has every part of a model, and agrees with how it describes itself.

    The settings of a diffusers folder (heads, groups, schedule, scale) are not visible in the shapes of its weights.
    Raises `CheckpointError`.
    """
    with reading(checkpoint.path):
        check_prediction(checkpoint.prediction, looks_like(checkpoint.kind))
        check_schedule(model, checkpoint.state_dict)
    present = parts_in(checkpoint.state_dict)
    kind = checkpoint.kind
    if not present and kind.part not in ("", "model", *WORDS.values()):
        raise _error(checkpoint, f"is {kind.name}, not a model; {_USES.get(kind.part, _NO_USE)}")
    _check_positions(model, checkpoint)
    absent = [part for part in WORDS if part not in present]
    if present and absent and kind.family in ("", V1):  # `load_into` names others
        options = " and ".join(f"--{part}" for part in absent if part != "unet")
        advice = "give a whole model" if "unet" in absent else f"give a whole model, or add {options}"
        raise _error(checkpoint, f"has the {_words(present)}, but no {_words(absent)}; {advice}")
    ours = component_configs(model, checkpoint.configs)
    for component, theirs in checkpoint.configs.items():
        of_clip = theirs.get("text_config")  # a whole CLIP's text encoder
        settings = of_clip if isinstance(of_clip, dict) else theirs
        for name, value in ours[component].items():
            if name in settings and settings[name] != value:
                raise _error(
                    checkpoint,
                    f"its {component} has {name} {printable(settings[name])[:100]}, and this config's model "
                    f"{printable(value)}{looks_like(checkpoint.kind)}",
                )


def _check_positions(model: LatentDiffusion, checkpoint: Checkpoint) -> None:
    """That a text encoder is not a LongCLIP, with more rows of positions, unless the model has them too."""
    theirs = checkpoint.state_dict.get(_POSITIONS)
    embedder = model.cond_stage_model
    if theirs is None or theirs.dim() != 2 or not isinstance(embedder, FrozenCLIPEmbedder):
        return
    own = embedder.transformer.text_model.embeddings.position_embedding.num_embeddings
    if len(theirs) == LONG_POSITIONS != own:
        raise _error(
            checkpoint,
            f"its text encoder has {LONG_POSITIONS} positions of tokens, as LongCLIP has, and this config's "
            f"model {own}; give a text encoder with {own}: --text_encoder",
        )


def _words(parts: Iterable[str]) -> str:
    return " and ".join(WORDS[part] for part in WORDS if part in set(parts))


def use_vocabulary(model: LatentDiffusion, folder: Path | None) -> None:
    """Lets the text encoder read prompts with the token table in `folder`, if there is one."""
    embedder = model.cond_stage_model
    if folder is None or not isinstance(embedder, FrozenCLIPEmbedder):
        return
    if (folder / "vocab.json").is_file():
        embedder.version = str(folder)
        return
    tokens = embedder.transformer.text_model.embeddings.token_embedding.num_embeddings
    with reading(folder / "tokenizer.json"):
        tokenizer = _read_tokenizer(folder / "tokenizer.json")
        if tokenizer.size != tokens:
            raise CheckpointError(f"has {tokenizer.size} entries, the text encoder {tokens}")
        embedder.reader = tokenizer


def _read_tokenizer(path: Path) -> CLIPTokenizer:
    """The tokenizer of the one file that newer versions of transformers write."""
    table = as_object(read_json(path).get("model"))
    ids = {token: i for token, i in as_object(table.get("vocab")).items() if isinstance(i, int)}
    pairs = [
        pair.split(" ") if isinstance(pair, str) else as_list(pair) for pair in as_list(table.get("merges"))
    ]
    return CLIPTokenizer(ids, [(str(left), str(right)) for left, right in pairs], printable(path))


def load_into(
    model: nn.Module,
    checkpoint: Checkpoint,
    dtype: torch.dtype | None = None,
    ema: Ema = "auto",
    logs: bool = True,
) -> LoadReport:
    """Gives `model`, built on the meta device, the tensors of `checkpoint` themselves, cast only if need be.

    `dtype` is what floating-point weights are cast to; None keeps the file's types, but for float8, in which torch
    computes little: those become the smallest type that holds each of their values, as a rule float16. Buffers
    that the model computed on the CPU (the noise schedule, position ids) keep their values. With `ema` "auto" the
    moving averages `model_ema.*` replace the U-Net's weights if the file has them; "on" demands them, "off"
    ignores them. A model with averages of its own, for a file without, gets its weights as averages (the same
    tensors). Parameters no longer require gradients. Missing keys, wrong shapes, missing EMA weights and two
    tensors for one key are a `CheckpointError`, raised before any tensor is read. What was chosen, cast and ignored
    is logged with `logs`.
    """
    expected = model.state_dict()
    found = checkpoint.state_dict
    weights = _choose_weights(found, checkpoint, ema)
    parameters = {name for name, _ in model.named_parameters()}
    chosen = _match(expected, parameters, found, weights)
    _check_keys(expected, chosen, checkpoint, weights)
    _check_shapes(expected, {**found, **chosen}, checkpoint)

    types = {key: _held_in(tensor, dtype) for key, tensor in chosen.items()}
    cast_from = {tensor.dtype for key, tensor in chosen.items() if types[key] != tensor.dtype}
    computed = tuple(key for key in expected if _keeps_own(key, expected[key]))
    values = {key: tensor.to(types[key]) for key, tensor in chosen.items()}
    values.update((key, expected[key]) for key in computed)
    model.load_state_dict(values, strict=True, assign=True)
    model.requires_grad_(False)
    on_meta = [name for name, tensor in _all_tensors(model).items() if tensor.is_meta]
    assert not on_meta, f"buffers that no state dict holds were built on the meta device: {on_meta}"

    leftover = [key for key in found if key not in expected]
    report = LoadReport(
        weights,
        computed,
        tuple(key for key in leftover if _is_harmless(key)),
        tuple(key for key in leftover if not _is_harmless(key)),
        tuple(sorted(cast_from, key=str)),
    )
    if logs:
        _log(report, checkpoint, dtype, only_averages(found))
    return report


def _choose_weights(
    found: Mapping[str, torch.Tensor], checkpoint: Checkpoint, ema: Ema
) -> Literal["ema", "plain"]:
    has_ema = has_averages(found)
    if ema == "on" and not has_ema:
        raise _error(checkpoint, "has no EMA weights (model_ema.*); load it with ema off")
    if ema == "off" and only_averages(found):
        raise _error(checkpoint, "has only EMA weights (model_ema.*) of its U-Net; load it with ema auto")
    return "ema" if has_ema and ema != "off" else "plain"


def has_averages(keys: Iterable[str]) -> bool:
    """Whether a file has moving averages of the U-Net's weights."""
    return any(key.startswith(EMA_PREFIX) and key not in EMA_COUNTERS for key in keys)


def only_averages(keys: Collection[str]) -> bool:
    """Whether a file has moving averages of the U-Net's weights, and not the weights themselves."""
    return has_averages(keys) and not any(key.startswith(PREFIXES["unet"]) for key in keys)


def _match(
    expected: Mapping[str, torch.Tensor],
    parameters: set[str],
    found: Mapping[str, torch.Tensor],
    weights: Literal["ema", "plain"],
) -> dict[str, torch.Tensor]:
    """The file's tensor for every key of the model that has one and does not keep its own value."""
    source = {key: key for key in expected}
    averaged = {key: ema_key(key) for key in parameters if key.startswith("model.")}
    if weights == "ema":
        source.update(averaged)
    source.update((average, source[key]) for key, average in averaged.items() if average not in found)
    return {
        key: found[source[key]]
        for key, own in expected.items()
        if source[key] in found and not _keeps_own(key, own)
    }


def _keeps_own(key: str, own: torch.Tensor) -> bool:
    return _is_computed(key) and not own.is_meta


def _is_computed(key: str) -> bool:
    return key in SCHEDULE_BUFFERS or key in EMA_COUNTERS or key.endswith("position_ids")


def _is_harmless(key: str) -> bool:
    return _is_computed(key) or key == "lvlb_weights" or key.startswith(_HARMLESS_PREFIXES) or is_mark(key)


def _held_in(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The type in which a model holds a tensor of a file."""
    if not tensor.is_floating_point():
        return tensor.dtype
    if dtype is None:
        return FLOAT8.get(tensor.dtype, tensor.dtype)
    return dtype


def _check_keys(
    expected: Mapping[str, torch.Tensor],
    chosen: Mapping[str, torch.Tensor],
    checkpoint: Checkpoint,
    weights: Literal["ema", "plain"],
) -> None:
    missing = [key for key, own in expected.items() if key not in chosen and not _keeps_own(key, own)]
    if missing:
        names = (
            [ema_key(key) if key.startswith("model.") else key for key in missing]
            if weights == "ema"
            else missing
        )
        may_go_without = weights == "ema" and not only_averages(checkpoint.state_dict)
        hint = "; load it with ema off" if may_go_without else looks_like(checkpoint.kind)
        raise _error(checkpoint, f"lacks {count_and_names(names)} that the model needs{hint}")


def _check_shapes(
    expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor], checkpoint: Checkpoint
) -> None:
    for key, own in expected.items():
        tensor = found.get(key, own)
        if tensor.shape != own.shape:
            raise _error(
                checkpoint,
                f"{key} has shape {list(tensor.shape)}, the model expects {list(own.shape)}: "
                f"config or checkpoint is of another model{looks_like(checkpoint.kind)}",
            )
        if own.is_floating_point() and not tensor.is_floating_point():
            raise _error(
                checkpoint, f"{key} is {tensor.dtype}, the model expects {own.dtype} (quantised weights?)"
            )


def _all_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _log(report: LoadReport, checkpoint: Checkpoint, dtype: torch.dtype | None, only: bool) -> None:
    path = printable(checkpoint.path)
    which = "EMA" if report.weights == "ema" else "plain"
    logger.info("%s: using the %s weights%s", path, which, ", it has no others" if only else "")
    if report.cast_from:
        held = sorted({str(dtype or FLOAT8[kind]) for kind in report.cast_from})
        logger.info(
            "%s: weights cast from %s to %s", path, ", ".join(map(str, report.cast_from)), ", ".join(held)
        )
    if report.unknown:
        logger.warning("%s: ignored %s that the model does not have", path, count_and_names(report.unknown))


def _error(checkpoint: Checkpoint, reason: str) -> CheckpointError:
    return CheckpointError(f"{printable(checkpoint.path)}: {reason}")
