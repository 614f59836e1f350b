"""The config of a model as its checkpoint needs it: published configs describe one kind of v1 model only."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

from ldm.checkpoints.formats.read import Checkpoint
from ldm.checkpoints.layouts.names import PREFIXES, unet_blocks
from ldm.util import printable

logger = logging.getLogger(__name__)

Config = Mapping[str, Any]
_CLIP = "ldm.modules.encoders.modules.FrozenCLIPEmbedder"
_UNET = "ldm.modules.diffusionmodules.openaimodel.UNetModel"
_GUIDANCE = f"{PREFIXES['unet']}time_embedding.cond_proj.weight"
_TEXT_LAYER = re.compile(
    rf"{re.escape(PREFIXES['text_encoder'])}transformer\.text_model\.encoder\.layers\.(\d+)\."
)


def suited(config: Config, checkpoint: Checkpoint) -> Config:
    """Returns a checked config with what `checkpoint` states about itself; the same object if nothing differs.

    What is changed is logged.
    """
    if not isinstance(config.get("params"), Mapping):
        return config
    for adapt in (_to_prediction, _to_text_layers, _to_blocks, _to_guidance):
        config = adapt(config, checkpoint)
    return config


def _changed(config: Config, checkpoint: Checkpoint, why: str, **params: Any) -> Config:
    """`config` with other parameters, for a stated reason."""
    logger.info("%s: %s", printable(checkpoint.path), why)
    return {**config, "params": {**config["params"], **params}}


def _to_prediction(config: Config, checkpoint: Checkpoint) -> Config:
    """What the U-Net predicts, and whether the schedule ends without signal."""
    params, stated = config["params"], checkpoint.prediction
    wanted: dict[str, Any] = {}
    if stated.parameterization:
        wanted["parameterization"] = stated.parameterization
    if stated.zero_snr:
        wanted["zero_terminal_snr"] = True
    usual = {"parameterization": "eps", "zero_terminal_snr": False}
    if all(params.get(name, usual[name]) == value for name, value in wanted.items()):
        return config
    return _changed(config, checkpoint, stated.stated or "predicts the noise", **wanted)


def _to_text_layers(config: Config, checkpoint: Checkpoint) -> Config:
    """A text encoder without its last layers, which has a CLIP skip built in."""
    encoder = config["params"].get("cond_stage_config")
    if not isinstance(encoder, Mapping) or encoder.get("target") != _CLIP:
        return config
    params = encoder.get("params") or {}
    layers, usual = _text_layers(checkpoint), params.get("layers", 12)
    if not 0 < layers < usual:
        return config
    why = (
        f"its text encoder has {layers} layers instead of {usual}: CLIP skip {usual - layers + 1} is built in"
    )
    changed = {**encoder, "params": {**params, "layers": layers}}
    return _changed(config, checkpoint, why, cond_stage_config=changed)


def _text_layers(checkpoint: Checkpoint) -> int:
    """How many layers a text encoder states or has; 0 if that is not known."""
    settings = checkpoint.configs.get("text_encoder", {})
    of_clip = settings.get("text_config")  # a whole CLIP's text encoder
    stated = (of_clip if isinstance(of_clip, Mapping) else settings).get("num_hidden_layers")
    if type(stated) is int:
        return stated
    found = {match[1] for match in map(_TEXT_LAYER.match, checkpoint.state_dict) if match}
    return len(found) if found == set(map(str, range(len(found)))) else 0


def _to_blocks(config: Config, checkpoint: Checkpoint) -> Config:
    """A U-Net with fewer levels, fewer blocks in each, or without its middle block."""
    unet = config["params"].get("unet_config")
    names = _unet_names(checkpoint)
    if not isinstance(unet, Mapping) or unet.get("target") != _UNET or not names:
        return config
    params = unet.get("params") or {}
    size, widths = unet_blocks(names), params.get("channel_mult", (1, 2, 4, 8))
    usual = len(widths), params.get("num_res_blocks", 0), params.get("use_middle_block", True)
    found = size.levels, size.each, size.middle
    if found == usual or not (1 <= size.levels <= len(widths) and 1 <= size.each <= usual[1]):
        return config
    why = f"a small U-Net: {size.levels} levels of {size.each}, {'with' if size.middle else 'without'} a middle block"
    small = {
        "channel_mult": list(widths[: size.levels]),
        "num_res_blocks": size.each,
        "attention_resolutions": [2**level for level in sorted(size.attention)],
        "use_middle_block": size.middle,
    }
    return _changed(config, checkpoint, why, unet_config={**unet, "params": {**params, **small}})


def _unet_names(checkpoint: Checkpoint) -> list[str]:
    prefix = PREFIXES["unet"]
    return [key.removeprefix(prefix) for key in checkpoint.state_dict if key.startswith(prefix)]


def _to_guidance(config: Config, checkpoint: Checkpoint) -> Config:
    """A distilled U-Net, which takes the guidance scale as an input."""
    unet, weight = config["params"].get("unet_config"), checkpoint.state_dict.get(_GUIDANCE)
    if not isinstance(unet, Mapping) or unet.get("target") != _UNET or weight is None or weight.dim() != 2:
        return config
    params = unet.get("params") or {}
    if params.get("time_cond_proj_dim") == weight.shape[1]:
        return config
    why = "a distilled model: its U-Net takes the guidance scale as an input"
    changed = {**unet, "params": {**params, "time_cond_proj_dim": weight.shape[1]}}
    return _changed(config, checkpoint, why, unet_config=changed)
