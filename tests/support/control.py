"""A control network for the tiny model, with the weights of the figures by its authors' code, and an IP-Adapter."""

from __future__ import annotations

from typing import Any

import torch

from ldm.modules.attention import cross_attentions
from ldm.modules.diffusionmodules.controlnet import ControlNet
from tests.support.golden_data import figure, tiny_config, weight_of

FIGURES = "tiny_control.npz"
# of a small image encoder for IP-Adapters
ENCODER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2,
           "image_size": 28, "patch_size": 14, "projection_dim": 24, "hidden_act": "gelu"}  # fmt: skip
PARAMETERS = tiny_config()["params"]["unet_config"]["params"]


def control_network(**changes: Any) -> ControlNet:
    network = ControlNet(hint_channels=3, **{**PARAMETERS, **changes})
    network.load_state_dict(control_weights(network))
    return network.eval().requires_grad_(False)


def control_weights(network: ControlNet | None = None) -> dict[str, torch.Tensor]:
    """The weights by the authors' names, without prefix."""
    shapes = (network or ControlNet(hint_channels=3, **PARAMETERS)).state_dict()
    return {key: weight_of(f"control_model.{key}", value.shape) for key, value in shapes.items()}


def given(*names: str) -> list[torch.Tensor]:
    return [figure(name, FIGURES) for name in names]


def ip_layers(model: Any) -> dict[str, tuple[int, int]]:
    """The shapes of keys and values under a file's names: odd numbers, down, up, then the middle."""
    sizes = [
        (one.to_k.out_features, one.to_k.in_features) for one in cross_attentions(model.model.diffusion_model)
    ]
    return {
        f"ip_adapter.{2 * i + 1}.to_{kind}_ip.weight": size for i, size in enumerate(sizes) for kind in "kv"
    }


def ip_weights(model: Any) -> dict[str, torch.Tensor]:
    """A plain IP-Adapter of four tokens."""
    shapes = {"proj.weight": (64, 24), "proj.bias": (64,), "norm.weight": (16,), "norm.bias": (16,)}
    return weights_of({f"image_proj.{name}": shape for name, shape in shapes.items()} | ip_layers(model))


def weights_of(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    return {key: weight_of(key, shape) for key, shape in shapes.items()}
