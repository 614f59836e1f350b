"""An exponential moving average of a model's weights."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class LitEma(nn.Module):
    """Keeps a smoothed copy of every trainable parameter of `model`, as buffers named without dots.

    With `use_num_upates` the decay warms up: min(decay, (1 + n) / (10 + n)) at the n-th update.
    """

    decay: Tensor
    num_updates: Tensor

    def __init__(self, model: nn.Module, decay: float = 0.9999, use_num_upates: bool = True):
        super().__init__()
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"decay is {decay}; it must be between 0 and 1")
        # set here, so they are never left on the meta device that a model may be built on
        self.register_buffer("decay", torch.tensor(decay, dtype=torch.float32, device="cpu"))
        self.register_buffer(
            "num_updates", torch.tensor(0 if use_num_upates else -1, dtype=torch.int, device="cpu")
        )
        self.names = {name: name.replace(".", "") for name, p in model.named_parameters() if p.requires_grad}
        parameters = dict(model.named_parameters())
        for name, shadow in self.names.items():
            self.register_buffer(shadow, parameters[name].detach().clone())
        self._stored: list[Tensor] = []

    @torch.no_grad()
    def forward(self, model: nn.Module) -> None:
        """Moves each average towards the model's current weights by (1 - decay) of the difference."""
        decay = float(self.decay)
        if self.num_updates >= 0:
            self.num_updates += 1
            updates = int(self.num_updates)
            decay = min(decay, (1 + updates) / (10 + updates))
        shadows = dict(self.named_buffers())
        for name, p in model.named_parameters():
            if name in self.names:
                shadow = shadows[self.names[name]]
                shadow.lerp_(p.to(shadow.dtype), 1.0 - decay)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Overwrites the model's weights with their averages."""
        shadows = dict(self.named_buffers())
        for name, p in model.named_parameters():
            if name in self.names:
                p.copy_(shadows[self.names[name]])

    def store(self, parameters: Iterable[nn.Parameter]) -> None:
        """Saves the current weights for `restore`."""
        self._stored = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def restore(self, parameters: Iterable[nn.Parameter]) -> None:
        """Restores the weights saved by `store`."""
        for p, stored in zip(parameters, self._stored, strict=True):
            p.copy_(stored)
        self._stored = []
