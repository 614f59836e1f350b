"""ControlNet files: recognised by content, read safely, and made into a network for a loaded U-Net."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoints.adapters.ip import check_ip, ip_network
from ldm.checkpoints.adapters.t2i import adapter_network, adapter_weights
from ldm.checkpoints.configs import BUNDLED_CONFIG, BUNDLED_WIDTH, V1_CONFIG
from ldm.checkpoints.formats.detect import CheckpointError, reading
from ldm.checkpoints.formats.read import Checkpoint
from ldm.checkpoints.layouts.control_names import DIFFERENCE, MARKS, PREFIX, own_weights
from ldm.checkpoints.layouts.recognise import V1
from ldm.checkpoints.load import load_into, skip_init
from ldm.checkpoints.model_files import model_files, read_json, read_model
from ldm.modules.diffusionmodules.adapter import T2IAdapter
from ldm.modules.diffusionmodules.controlnet import ControlNet
from ldm.modules.diffusionmodules.image_prompt import IPAdapter
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.places import find
from ldm.util import InputError, printable

_FIRST, _HINT = "input_blocks.0.0.weight", "input_hint_block.0.weight"
_FIRST_IN_ALL = re.compile(rf"({re.escape(PREFIX)})?{re.escape(_FIRST)}|conv_in\.weight")
_POOLS = re.compile(
    r"shuffle", re.IGNORECASE
)  # the one published kind whose maps are averaged has it in its name


@dataclass(frozen=True)
class ControlFile:
    """A ControlNet's weights under its authors' names without prefix.

    Those of a `difference` file are differences from the weights of a U-Net. With `pools` its maps are averaged over
    height and width, as the authors' shuffle model wants it. `reversed_channels` is for hints in BGR. With
    `is_adapter` it is a T2I-Adapter.
    """

    source: Checkpoint
    weights: Mapping[str, Tensor]
    is_difference: bool = False
    pools: bool = False
    is_adapter: bool = False
    reversed_channels: bool = False

    @property
    def is_image_prompt(self) -> bool:
        """Whether it is an IP-Adapter, whose image is a prompt and not a hint."""
        return self.source.kind.part == "IP-Adapter"


def control_file(name: str | Path) -> Path:
    """The path of a ControlNet, a file or a folder of diffusers; an `InputError` where there is none."""
    path = find(name)
    if not path.exists():
        raise InputError(
            f"the ControlNet {printable(path)} does not exist; give a file, or a folder that diffusers saved"
        )
    return path


def control_parts(path: Path) -> list[Path]:
    """The files that a ControlNet's weights are in."""
    return model_files(path)


def read_control(path: Path, mmap: bool = True) -> ControlFile:
    """The ControlNet in a file or a folder of diffusers; other models are a `CheckpointError` that names them."""
    checkpoint = read_model(path, mmap)
    kind, keys = checkpoint.kind, checkpoint.state_dict
    with reading(path):
        if kind.part == "T2I-Adapter":
            weights = adapter_weights(keys)
            return ControlFile(replace(checkpoint, state_dict=weights), weights, is_adapter=True)
        if kind.part == "IP-Adapter":
            check_ip(keys)
            return ControlFile(checkpoint, keys)
        if kind.part != "ControlNet":
            raise CheckpointError(
                f"is {kind.name}; give a ControlNet, a T2I-Adapter or an IP-Adapter with --control"
            )
        if any(key.endswith(MARKS[1]) for key in keys):
            raise CheckpointError("is a Control-LoRA, which is not supported; give a whole ControlNet")
        if kind.family not in ("", V1):
            raise CheckpointError(f"is {kind.name}, and this toolkit runs Stable Diffusion v1")
        weights = own_weights(keys)
        if lost := next(
            (name for name in (_FIRST, _HINT) if weights.get(name, torch.empty(0)).dim() != 4), None
        ):
            raise CheckpointError(f"is a ControlNet without {lost}; the file is incomplete")
    config: Mapping[str, Any] = read_json(path / "config.json") if path.is_dir() else {}
    return ControlFile(
        replace(checkpoint, state_dict=weights),
        weights,
        is_difference=any(key in (DIFFERENCE, PREFIX + DIFFERENCE) for key in keys),
        pools=bool(config.get("global_pool_conditions", _POOLS.search(path.name))),
        reversed_channels=config.get("controlnet_conditioning_channel_order") == "bgr",
    )


def config_for_control(state_dict: Mapping[str, Tensor]) -> str:
    """The config of the models that a ControlNet is for: v1's, or the bundled model's."""
    first = next((tensor for key, tensor in state_dict.items() if _FIRST_IN_ALL.fullmatch(key)), None)
    bundled = first is not None and first.dim() == 4 and first.shape[0] == BUNDLED_WIDTH
    return BUNDLED_CONFIG if bundled else V1_CONFIG


def network_of(file: ControlFile, unet: UNetModel) -> ControlNet | T2IAdapter | IPAdapter:
    """The network of a file, a ControlNet or an adapter, for a U-Net."""
    if file.is_image_prompt:
        return ip_network(file.source, unet)
    return (
        adapter_network(file.source, file.weights, unet) if file.is_adapter else control_network(file, unet)
    )


def control_network(file: ControlFile, unet: UNetModel, dtype: torch.dtype | None = None) -> ControlNet:
    """The network of a file, of the same shape as `unet`, whose weights those of a `difference` file are added to.

    Floating-point weights are cast to `dtype`, unless it is None. `CheckpointError` where a weight is absent or has
    another shape.
    """
    theirs, ours = file.weights[_FIRST].shape[0], unet.model_channels
    if theirs != ours:
        raise CheckpointError(
            f"{printable(file.source.path)}: is {file.source.kind.name} of {theirs} channels, and the model has "
            f"{ours}; give one that was trained for this model"
        )
    own: dict[str, Any] = {
        "in_channels": file.weights[_FIRST].shape[1],
        "hint_channels": file.weights[_HINT].shape[1],
        "time_cond_proj_dim": None,
    }
    with torch.device("meta"), skip_init():
        network = ControlNet(**{**unet.settings, **own})
    source = file.source
    if file.is_difference and not next(unet.parameters()).is_meta:
        base = unet.state_dict()
        weights = {
            key: base[key].to("cpu").float() + change.float() if key in base else change
            for key, change in file.weights.items()
        }
        source = replace(source, state_dict=weights)
    load_into(network, source, dtype, logs=False)
    return network.eval()
