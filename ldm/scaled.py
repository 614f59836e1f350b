"""Weights that a file holds as 8-bit whole numbers with scales: to all other code they are float tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

_DIVIDE = (torch.ops.aten.split.Tensor, torch.ops.aten.chunk.default)  # along the output channels
_PIECE = 2**20  # values rounded at a time: large weights are rounded without copies of their size
SCALE = "_scale"  # a weight `x` of int8 has its scales under `x_scale`


class ScaledWeight(Tensor):
    """A weight of the given shape whose values are whole numbers times scales; it takes the memory of those.

    The scales [...] each belong to one entry along the first dimensions of the int8 tensor `whole`: to an output
    channel, or to a block of one. Every operation sees the values in float32, computed when it runs.
    """

    whole: Tensor
    scale: Tensor

    @staticmethod
    def __new__(
        cls: type[ScaledWeight], whole: Tensor, scale: Tensor, shape: torch.Size | None = None
    ) -> ScaledWeight:
        # `_make_wrapper_subclass` is how torch makes a tensor without memory of its own
        make: Any = Tensor._make_wrapper_subclass  # type: ignore
        made: ScaledWeight = make(cls, shape or whole.shape, dtype=torch.float32)
        made.whole, made.scale = whole, scale
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"ScaledWeight({list(self.shape)})"

    @property
    def by_channel(self) -> bool:
        """Whether there is one scale for each output channel, as `round_weight` gives it."""
        return self.whole.shape == self.shape and self.scale.shape == self.shape[:1]

    def values(self) -> Tensor:  # type: ignore[override]
        """Returns the values in float32."""
        scale = self.scale.float().reshape(*self.scale.shape, *[1] * (self.whole.dim() - self.scale.dim()))
        return (self.whole * scale).reshape(self.shape)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch.inference_mode(False), torch.no_grad():  # what is a view of this has to be a normal tensor
            if func is torch.ops.aten.detach.default:
                (weight,) = args
                return cls(weight.whole, weight.scale, weight.shape)
            if func in _DIVIDE and len(args) == 2 and args[0].by_channel:
                weight, how = args
                parts = func(weight.whole, how), func(weight.scale, how)
                return [cls(whole, scale) for whole, scale in zip(*parts, strict=True)]
            values = tree_map(_valued, (args, kwargs or {}))
            return func(*values[0], **values[1])


def _valued(x: Any) -> Any:
    return x.values() if isinstance(x, ScaledWeight) else x


def round_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds a weight [out, ...] to int8; returns it with the scale of each output channel [out], float32.

    The greatest of a channel becomes 127 or -127, so that rounding the values again gives the same.
    """
    if isinstance(weight, ScaledWeight) and weight.by_channel:
        return weight.whole, weight.scale
    given = weight.values() if isinstance(weight, ScaledWeight) else weight.detach()
    whole = torch.empty(given.shape, dtype=torch.int8, device=given.device)
    scale = torch.empty(len(given), device=given.device)
    channels = max(_PIECE * len(given) // max(given.numel(), 1), 1)
    for start in range(0, len(given), channels):
        part = slice(start, start + channels)
        values = given[part].flatten(1).float()
        scale[part] = values.abs().amax(1).clamp_(min=torch.finfo(torch.float32).tiny) / 127
        whole[part] = (values / scale[part, None]).round_().view(whole[part].shape)
    return whole, scale


def joined(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns tensors by key with each int8 weight and its scales as one. Raises ValueError if they do not fit."""
    scaled = {key for key, tensor in tensors.items() if tensor.dtype is torch.int8 and key + SCALE in tensors}
    for key in scaled:
        weight, scale = tensors[key], tensors[key + SCALE]
        if not scale.is_floating_point() or weight.shape[:1] != scale.shape:
            raise ValueError(
                f"{key[:200]!r} has scales of {scale.dtype} and shape {list(scale.shape)}, "
                f"not one float for each of its {weight.shape[:1].numel()} output channels"
            )
    scales = {key + SCALE for key in scaled}
    return {
        key: ScaledWeight(tensor, tensors[key + SCALE]) if key in scaled else tensor
        for key, tensor in tensors.items()
        if key not in scales
    }


def stored_type(tensor: Tensor) -> torch.dtype:
    """Returns the type of the numbers that a file holds for a tensor."""
    return tensor.whole.dtype if isinstance(tensor, ScaledWeight) else tensor.dtype
