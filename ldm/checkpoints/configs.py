"""This toolkit's configs, the places of their checkpoints, and which config a checkpoint needs by its content."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ldm.models.keys import COND_STAGE_PREFIX, UNET_PREFIX

if TYPE_CHECKING:
    import torch

V1_CONFIG = "configs/stable-diffusion/v1-inference.yaml"
INPAINTING_CONFIG = "configs/stable-diffusion/v1-inpainting-inference.yaml"
EDIT_CONFIG = "configs/stable-diffusion/v1-edit-inference.yaml"
LAION_CONFIG = "configs/latent-diffusion/txt2img-1p4B-eval.yaml"
BUNDLED_CONFIG = "configs/shapes/shapes-inference.yaml"
BUNDLED_INPAINTING_CONFIG = (
    "configs/shapes/shapes-inpainting-inference.yaml"  # `train.py inpainting` makes one
)
V1_CKPT = "models/ldm/stable-diffusion-v1/model.ckpt"
INPAINTING_CKPT = "models/ldm/stable-diffusion-v1-inpainting/model.ckpt"
LAION_CKPT = "models/ldm/text2img-large/model.ckpt"
BUNDLED_CKPT = "models/ldm/shapes/model.ckpt"
BUNDLED_LORA = "models/ldm/shapes/lcm.safetensors"  # with which that one draws in few steps
BUNDLED_CONTROL = "models/ldm/shapes/control.safetensors"  # of edges, for that one

# weights of the bundled model that no published model has in these shapes
BUNDLED_WIDTH = 64  # of its U-Net's first level
_BUNDLED = {
    f"{UNET_PREFIX}input_blocks.0.0.bias": (BUNDLED_WIDTH,),
    f"{COND_STAGE_PREFIX}transformer.text_model.embeddings.token_embedding.weight": (1000, 192),
}


def config_for(state_dict: Mapping[str, torch.Tensor]) -> str:
    """The config, below the toolkit's own folder, of a model in the original's layout; by default that of v1."""
    from ldm.checkpoints.layouts.recognise import EDIT, INPAINTING, ema_key, input_variant, is_laion_model

    if is_laion_model(state_dict):
        return LAION_CONFIG
    found = {key: state_dict.get(key, state_dict.get(ema_key(key))) for key in _BUNDLED}
    bundled = all(weight is not None and weight.shape == _BUNDLED[key] for key, weight in found.items())
    variant = input_variant(state_dict)
    if variant == EDIT:
        return EDIT_CONFIG
    if variant == INPAINTING:
        return BUNDLED_INPAINTING_CONFIG if bundled else INPAINTING_CONFIG
    return BUNDLED_CONFIG if bundled else V1_CONFIG
