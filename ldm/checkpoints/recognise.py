"""Tells other models by the keys of their checkpoints, to say in one line why a file does not fit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

_UNET = "model.diffusion_model."
_CROSS_ATTENTION = f"{_UNET}input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight"
_FIRST_CONVOLUTION = f"{_UNET}input_blocks.0.0.weight"
_SD2_WIDTH = 1024
_INPAINTING_CHANNELS = 9

# (prefix or part of a key, model); the first that occurs decides.
_PREFIXES = (
    ("conditioner.embedders.", "SDXL"),
    ("cond_stage_model.model.transformer.resblocks.", "Stable Diffusion v2"),
    ("control_model.", "a ControlNet"),
    ("lora_", "a LoRA"),
    ("lycoris_", "a LoRA"),
    ("string_to_param", "a textual inversion embedding"),
    ("emb_params", "a textual inversion embedding"),
    ("down_blocks.", "a U-Net in the diffusers layout"),
    ("controlnet_", "a ControlNet in the diffusers layout"),
    ("encoder.down_blocks.", "an autoencoder in the diffusers layout"),
    ("decoder.up_blocks.", "an autoencoder in the diffusers layout"),
    ("encoder.down.", "an autoencoder (VAE) alone"),
    ("decoder.up.", "an autoencoder (VAE) alone"),
    ("text_model.", "a text encoder alone"),
)
_PARTS = (
    (".lora_down.", "a LoRA"),
    (".lora_A.", "a LoRA"),
    (".lora.down.", "a LoRA"),
    ("_lora.down.", "a LoRA"),
)


def other_model(state_dict: Mapping[str, torch.Tensor]) -> str | None:
    """What the state dict seems to be if it is no whole Stable Diffusion v1 model, such as "SDXL"; else None.

    A v1 inpainting model counts as another model too: it needs its own config.
    """
    named = _by_names(state_dict)
    if named:
        return named
    if _dimension(state_dict, _CROSS_ATTENTION, -1) == _SD2_WIDTH:
        return "Stable Diffusion v2"
    channels = _dimension(state_dict, _FIRST_CONVOLUTION, 1)
    return {
        8: "InstructPix2Pix (8 input channels)",
        _INPAINTING_CHANNELS: "an inpainting model (9 input channels), which needs the inpainting config",
    }.get(channels)


def is_inpainting_model(state_dict: Mapping[str, torch.Tensor]) -> bool:
    """Whether the U-Net takes a mask and a masked picture beside the latent: 9 input channels."""
    return _dimension(state_dict, _FIRST_CONVOLUTION, 1) == _INPAINTING_CHANNELS


def _by_names(keys: Iterable[str]) -> str | None:
    names = [str(key) for key in keys]
    for prefix, model in _PREFIXES:
        if any(name.startswith(prefix) for name in names):
            return model
    for part, model in _PARTS:
        if any(part in name for name in names):
            return model
    return None


def looks_like(state_dict: Mapping[str, torch.Tensor]) -> str:
    """A clause for an error message, such as "; it looks like SDXL, this toolkit runs ..."; often empty."""
    other = other_model(state_dict)
    return f"; it looks like {other}, and this toolkit runs Stable Diffusion v1" if other else ""


def _dimension(state_dict: Mapping[str, torch.Tensor], key: str, axis: int) -> int:
    shape = state_dict[key].shape if key in state_dict else ()
    return shape[axis] if len(shape) >= 2 else 0
