"""The config of a model as its checkpoint needs it: published configs describe one kind of v1 model only."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from ldm.checkpoints.formats.read import Checkpoint
from ldm.checkpoints.layouts.names import PREFIXES, keys_of_half, small_halves, unet_blocks
from ldm.util import is_mapping, printable

logger = logging.getLogger(__name__)

Config = Mapping[str, Any]
_CLIP = "ldm.modules.encoders.modules.FrozenCLIPEmbedder"
_UNET = "ldm.modules.diffusionmodules.openaimodel.UNetModel"
_KL, _TAESD = "ldm.models.autoencoder.AutoencoderKL", "ldm.models.autoencoder.SmallAutoencoder"
_GUIDANCE = f"{PREFIXES['unet']}time_embedding.cond_proj.weight"
_TEXT_LAYER = re.compile(
    rf"{re.escape(PREFIXES['text_encoder'])}transformer\.text_model\.encoder\.layers\.(\d+)\."
)


def suited(config: Config, checkpoint: Checkpoint) -> Config:
    """Returns a checked config with what `checkpoint` states about itself; the same object if nothing differs.

    What is changed is logged.
    """
    config, reasons = adapted(config, checkpoint)
    for reason in reasons:
        logger.info("%s: %s", printable(checkpoint.path), reason)
    return config


def adapted(config: Config, checkpoint: Checkpoint) -> tuple[Config, list[str]]:
    """Returns what `suited` returns, and the reasons for each change."""
    reasons: list[str] = []
    for find in (_prediction, _fewer_text_layers, _fewer_blocks, _guidance_input, _small_autoencoder):
        params = config.get("params")
        if is_mapping(params) and (change := find(params, checkpoint)) is not None:
            config = {**config, "params": {**params, **change.params}}
            reasons.append(change.why)
    return config, reasons


class _Change(NamedTuple):
    """Other parameters of a model, and the reason for them."""

    why: str
    params: dict[str, Any]


def _prediction(params: Config, checkpoint: Checkpoint) -> _Change | None:
    """Returns what the U-Net predicts, and whether the schedule ends without signal."""
    stated = checkpoint.prediction
    wanted: dict[str, Any] = {}
    if stated.parameterization:
        wanted["parameterization"] = stated.parameterization
    if stated.zero_snr or stated.parameterization == "eps":
        wanted["zero_terminal_snr"] = stated.zero_snr
    usual = {"parameterization": "eps", "zero_terminal_snr": False}
    if all(params.get(name, usual[name]) == value for name, value in wanted.items()):
        return None
    return _Change(stated.stated or "predicts the noise", wanted)


def _fewer_text_layers(params: Config, checkpoint: Checkpoint) -> _Change | None:
    """A text encoder without its last layers, which has a CLIP skip built in."""
    encoder = params.get("cond_stage_config")
    if not is_mapping(encoder) or encoder.get("target") != _CLIP:
        return None
    own: Config = encoder.get("params") or {}
    layers, usual = _text_layers(checkpoint), own.get("layers", 12)
    if not 0 < layers < usual:
        return None
    why = (
        f"its text encoder has {layers} layers instead of {usual}: CLIP skip {usual - layers + 1} is built in"
    )
    return _Change(why, {"cond_stage_config": {**encoder, "params": {**own, "layers": layers}}})


def _text_layers(checkpoint: Checkpoint) -> int:
    """How many layers a text encoder states or has; 0 if that is not known."""
    settings = checkpoint.configs.get("text_encoder", {})
    of_clip = settings.get("text_config")  # a whole CLIP's text encoder
    stated = (of_clip if isinstance(of_clip, dict) else settings).get("num_hidden_layers")
    if isinstance(stated, int) and not isinstance(stated, bool):
        return stated
    found = {match[1] for match in map(_TEXT_LAYER.match, checkpoint.state_dict) if match}
    return len(found) if found == set(map(str, range(len(found)))) else 0


def _fewer_blocks(params: Config, checkpoint: Checkpoint) -> _Change | None:
    """A U-Net with fewer levels, fewer blocks in each, or without its middle block."""
    unet, names = params.get("unet_config"), _unet_names(checkpoint)
    if not is_mapping(unet) or unet.get("target") != _UNET or not names:
        return None
    own: Config = unet.get("params") or {}
    size, widths = unet_blocks(names), own.get("channel_mult", (1, 2, 4, 8))
    usual = len(widths), own.get("num_res_blocks", 0)
    smaller = size.levels <= usual[0] and size.each <= usual[1] and (size.levels, size.each) != usual
    blocks = {name.split(".")[1] for name in names if name.startswith("input_blocks.")}
    whole = blocks == set(map(str, range(size.levels * (size.each + 1))))  # else it is a damaged file
    first = checkpoint.state_dict.get(f"{PREFIXES['unet']}input_blocks.0.0.weight")
    as_wide = first is not None and first.dim() > 0 and len(first) == own.get("model_channels")
    if not (smaller and whole and size.each and as_wide):
        return None
    why = f"a small U-Net: {size.levels} levels of {size.each}, {'with' if size.middle else 'without'} a middle block"
    small = {
        "channel_mult": list(widths[: size.levels]),
        "num_res_blocks": size.each,
        "attention_resolutions": [2**level for level in sorted(size.attention)],
        "use_middle_block": size.middle,
    }
    return _Change(why, {"unet_config": {**unet, "params": {**own, **small}}})


def _unet_names(checkpoint: Checkpoint) -> list[str]:
    prefix = PREFIXES["unet"]
    return [key.removeprefix(prefix) for key in checkpoint.state_dict if key.startswith(prefix)]


def _guidance_input(params: Config, checkpoint: Checkpoint) -> _Change | None:
    """A distilled U-Net, which takes the guidance scale as an input."""
    unet, weight = params.get("unet_config"), checkpoint.state_dict.get(_GUIDANCE)
    if not is_mapping(unet) or unet.get("target") != _UNET or weight is None or weight.dim() != 2:
        return None
    own: Config = unet.get("params") or {}
    if own.get("time_cond_proj_dim") == weight.shape[1]:
        return None
    why = "a distilled model: its U-Net takes the guidance scale as an input"
    return _Change(why, {"unet_config": {**unet, "params": {**own, "time_cond_proj_dim": weight.shape[1]}}})


def _small_autoencoder(params: Config, checkpoint: Checkpoint) -> _Change | None:
    """An autoencoder of which one half or both are TAESD's."""
    first, halves = params.get("first_stage_config"), small_halves(checkpoint.state_dict)
    if not is_mapping(first) or first.get("target") != _KL or not halves:
        return None
    begins = keys_of_half(halves[0])
    widths = [
        len(tensor)
        for key, tensor in checkpoint.state_dict.items()
        if key.startswith(begins) and tensor.dim() == 4
    ]
    own = {"halves": halves, "width": widths[0], "scale_factor": params.get("scale_factor", 1.0)}
    why = f"the {' and the '.join(halves)} of its autoencoder {'is' if len(halves) == 1 else 'are'} TAESD's"
    return _Change(
        why, {"first_stage_config": {"target": _TAESD, "params": {**(first.get("params") or {}), **own}}}
    )
