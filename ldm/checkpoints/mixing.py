"""Adds up the weights of several models: weighted sums, and differences added to a model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.checkpoints.layouts.recognise import count_and_names
from ldm.models.keys import COND_STAGE_PREFIX, EMA_PREFIX, UNET_PREFIX
from ldm.util import InputError, printable

_BLOCK = re.compile(r"(input_blocks|middle_block|output_blocks)\.(\d+)\.")
_BLOCKS = (*(f"IN{i:02}" for i in range(12)), "M00", *(f"OUT{i:02}" for i in range(12)))


@dataclass(frozen=True)
class Addition:
    """A change of each weight W: W + weight * (plus - minus), where `minus` may be W itself (a weighted sum).

    `blocks` gives other weights for the blocks of the U-Net: 26 numbers as in the merging extensions of web UIs, the
    first for what is in no block (and the text encoder), then IN00 to IN11, M00, OUT00 to OUT11.
    """

    plus: Mapping[str, Tensor]
    minus: Mapping[str, Tensor] | None
    weight: float
    blocks: Sequence[float] = ()

    def __post_init__(self) -> None:
        if self.blocks and len(self.blocks) != 1 + len(_BLOCKS):
            raise InputError(
                f"{len(self.blocks)} block weights were given; give {1 + len(_BLOCKS)}: for what is in no block, "
                "then IN00 to IN11, M00, OUT00 to OUT11"
            )

    def weight_of(self, key: str) -> float:
        """Returns the weight for one key."""
        if not self.blocks or not key.startswith((UNET_PREFIX, COND_STAGE_PREFIX)):
            return self.weight
        match = _BLOCK.match(key.removeprefix(UNET_PREFIX))
        if match is None:
            return self.blocks[0]
        first = {"input_blocks": 1, "middle_block": 13, "output_blocks": 14}[match[1]]
        return self.blocks[first + (0 if match[1] == "middle_block" else int(match[2]))]


def mixed(state_dict: Mapping[str, Tensor], addition: Addition) -> dict[str, Tensor]:
    """Returns the state with the addition, computed in float32, each weight in its own type.

    Weights of the schedule and averages stay as they are. If a weight is missing in one of the models, or has another
    shape, that is an `InputError`.
    """
    used = [key for key, value in state_dict.items() if _is_mixed(key, value)]
    others = [addition.plus] if addition.minus is None else [addition.plus, addition.minus]
    for other in others:
        if missing := [key for key in used if key not in other]:
            raise InputError(
                f"a model that is added lacks {count_and_names(missing)}; add models of one kind"
            )
        for key in used:
            if other[key].shape != state_dict[key].shape:
                shapes = f"{list(other[key].shape)} instead of {list(state_dict[key].shape)}"
                raise InputError(f"a model that is added has {printable(key)} of shape {shapes}")
    result = dict(state_dict)
    for key in used:
        own, weight = state_dict[key], addition.weight_of(key)
        minus = own if addition.minus is None else addition.minus[key]
        if weight:
            total = own.float() + weight * (addition.plus[key].float() - minus.float())
            result[key] = total.to(own.dtype)
    return result


def _is_mixed(key: str, value: Tensor) -> bool:
    """Whether a key is a weight: not one of the schedule, of averages, or of whole numbers."""
    return "." in key and value.dtype in _FLOATS and not key.startswith(EMA_PREFIX)


_FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
