"""A control network for the tiny model, with the weights of the figures by its authors' code."""

from __future__ import annotations

from typing import Any

import torch

from ldm.modules.diffusionmodules.controlnet import ControlNet
from tests.support.golden_data import figure, tiny_config, weight_of

FIGURES = "tiny_control.npz"
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
