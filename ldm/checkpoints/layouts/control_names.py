"""Names of a ControlNet's weights in the layouts of its authors and of diffusers, and the way between them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from ldm.checkpoints.formats.detect import CheckpointError
from ldm.checkpoints.layouts.names import encoder_pairs, renamed, unet_blocks
from ldm.util import printable

PREFIX = "control_model."  # in files of the authors
DIFFERENCE = "difference"  # a mark: the encoder's weights are differences from those of a U-Net
MARKS = (DIFFERENCE, "lora_controlnet")
_HINT = "controlnet_cond_embedding"
_HINT_BLOCKS = 6  # between the first and the last convolution


def own_weights(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The control network in a state dict, alone or around it a whole model, under its authors' names, without marks.

    Tensors are the same. `CheckpointError` for names of diffusers that have no place in it.
    """
    inside = [key for key in state_dict if key.startswith(PREFIX)]
    found = {key.removeprefix(PREFIX): state_dict[key] for key in inside or state_dict}
    found = {name: tensor for name, tensor in found.items() if name not in MARKS}
    if not any(name.startswith("controlnet_") for name in found):
        return found
    return _translated(found, {theirs: ours for ours, theirs in _pairs(list(found))})


def diffusers_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of `own_weights` under diffusers' names."""
    return _translated(weights, dict(_pairs(list(weights))))


def _translated(weights: Mapping[str, Tensor], table: Mapping[str, str]) -> dict[str, Tensor]:
    names = {name: renamed(name, table) for name in weights}
    if lost := next((name for name, new in names.items() if new is None), None):
        raise CheckpointError(f"{printable(lost[:200])} has no place in a ControlNet")
    return {str(new): weights[name] for name, new in names.items()}


def _pairs(names: list[str]) -> Iterator[tuple[str, str]]:
    """The authors' names of the modules, and diffusers', for a network whose size is counted in the names."""
    size = unet_blocks(names)
    yield from encoder_pairs(size)
    yield "input_hint_block.0", f"{_HINT}.conv_in"
    for i in range(_HINT_BLOCKS):
        yield f"input_hint_block.{2 * (i + 1)}", f"{_HINT}.blocks.{i}"
    yield f"input_hint_block.{2 * (_HINT_BLOCKS + 1)}", f"{_HINT}.conv_out"
    for i in range(size.levels * (size.each + 1)):
        yield f"zero_convs.{i}.0", f"controlnet_down_blocks.{i}"
    yield "middle_block_out.0", "controlnet_mid_block"
