"""The halves of a guided batch: what they have in common, everything before the first cross-attention, once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.modules.attention import SpatialTransformer
from ldm.modules.diffusionmodules.controlnet import ControlNet
from ldm.modules.diffusionmodules.openaimodel import UNetEncoder, UNetModel


def repeated(x: Tensor, samples: int) -> Tensor:
    """Repeats `x` along its first axis until it has the given number of samples."""
    return x if len(x) == samples else x.repeat(samples // len(x), *[1] * (x.dim() - 1))


class _Sharing(UNetEncoder):
    """A network that finds out what its batch has in common."""

    def _shared(
        self, x: Tensor, timesteps: Tensor, context: Tensor | None, *per_sample: Tensor
    ) -> list[Tensor]:
        """`x`, `timesteps` and `per_sample` [N], each once where it is the same for all, x for both halves."""
        times = [timesteps, *per_sample]
        if all(torch.equal(value, value[:1].expand_as(value)) for value in times):
            times = [value[:1] for value in times]
            half = len(x) // 2
            if self._looks_at(context, len(x)) and torch.equal(x[:half], x[half:]):
                x = x[:half]
        return [x, *times]

    def _looks_at(self, context: Tensor | None, samples: int) -> bool:
        if context is None or len(context) != samples or samples % 2:
            return False
        return any(isinstance(layer, SpatialTransformer) for layer in self.input_blocks.modules())


class FastUNet(_Sharing, UNetModel):
    """Shares what the halves of a guided batch have in common."""

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor | None = None,
        y: None = None,
        guidance: Tensor | None = None,
        control: Sequence[Tensor] | None = None,
        features: Mapping[int, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if guidance is None:
            x, timesteps = self._shared(x, timesteps, context)
        else:
            x, timesteps, guidance = self._shared(x, timesteps, context, guidance)
        return super().forward(x, timesteps, context, y, guidance, control, features, **kwargs)

    def with_control(self, h: Tensor, added: Tensor) -> Tensor:
        rows = max(len(h), len(added))
        return super().with_control(repeated(h, rows), repeated(added, rows))

    def with_skip(self, h: Tensor, skip: Tensor) -> Tensor:
        return super().with_skip(h, repeated(skip, len(h)))


class FastControlNet(_Sharing, ControlNet):
    """Shares what the halves of a guided batch have in common; the first of the maps are then of one half."""

    def add(self, x: Tensor, features: Tensor, timesteps: Tensor, context: Tensor | None) -> list[Tensor]:
        x, timesteps = self._shared(x, timesteps, context)
        return super().add(x, features, timesteps, context)
