"""Layers that keep their weights packed for the kernels that run them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from ldm.runtime import kernels

Forget = Callable[[Tensor], object]
Made = TypeVar("Made")


@dataclass(frozen=True, slots=True)
class _Kept:
    """The packed form of a weight, and its size in bytes."""

    weight: Tensor
    version: int
    made: Any
    size: int


class Packer:
    """Casts and packs weights, once for each layer, within a `budget` in bytes (None: no limit).

    Weights that do not fit are packed at each use. `forget` is called with each weight that was read, so that a
    file's pages can leave memory.
    """

    def __init__(self, dtype: torch.dtype, forget: Forget, budget: int | None = None):
        self.dtype = dtype
        self._forget = forget
        self._budget = budget
        self._kept: dict[nn.Module, _Kept] = {}

    def get(self, user: nn.Module, weight: Tensor, make: Callable[[Tensor], Made]) -> Made:
        """Returns `make(weight)` for `user`, cached until the weight is another object or was changed in place."""
        version = 0 if weight.is_inference() else weight._version
        kept = self._kept.get(user)
        if kept is not None and kept.weight is weight and kept.version == version:
            return kept.made
        self._kept.pop(user, None)
        made = make(weight)
        self._forget(weight)
        size = weight.numel() * _itemsize(made)
        if self._budget is None or size + self.size <= self._budget:
            self._kept[user] = _Kept(weight, version, made, size)
        return made

    @property
    def size(self) -> int:
        """The bytes of the cached weights."""
        return sum(kept.size for kept in self._kept.values())

    def drop(self, module: nn.Module) -> None:
        """Frees the cached weights of the layers of `module`."""
        for layer in module.modules():
            self._kept.pop(layer, None)


def _itemsize(made: Any) -> int:
    """Returns the bytes of a number of a packed weight: a tensor, several, or one with what belongs to it."""
    return made.dtype.itemsize if isinstance(made, Tensor) else _itemsize(made[0])


class Kernels(Protocol):
    """The functions that a layer with packed weights calls: `ldm.runtime.kernels` or `ldm.runtime.int8`.

    `as_input` and `silu` give an input, or its SiLU, in the form that `convolve` and `multiply` compute with; layers
    with the same kernels can share it. What they return is in the dtype of the packed weight.
    """

    def as_input(self, x: Any, dtype: torch.dtype) -> Any: ...

    def silu(self, x: Tensor) -> Any: ...

    def pack_convolution(
        self,
        weight: Tensor,
        dtype: torch.dtype,
        stride: Sequence[int],
        padding: Sequence[int],
        size: Sequence[int],
    ) -> Any: ...

    def convolve(
        self,
        x: Any,
        packed: Any,
        bias: Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        add: Tensor | None = None,
    ) -> Tensor: ...

    def convolve_doubled(self, x: Any, packed: Sequence[Any], bias: Tensor | None) -> Tensor: ...

    def pack_linear(self, weight: Tensor, dtype: torch.dtype) -> Any: ...

    def multiply(
        self,
        x: Any,
        packed: Any,
        bias: Tensor | None,
        add: Tensor | None = None,
        times: Tensor | None = None,
        gelu: bool = False,
    ) -> Tensor: ...


class PackedConv2d(nn.Conv2d):
    """A convolution whose weight is packed when it first runs. Inputs of any dtype; output in the packer's."""

    packer: Packer
    kernels: Kernels = cast(Kernels, kernels)

    def forward(self, input: Any, add: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        """Convolves; `add` has the output's shape, `shift` [1, out_channels] is equal for all samples and pixels."""
        stride, padding = self.stride, cast(tuple[int, ...], self.padding)
        packed = self.packer.get(
            self,
            self.weight,
            lambda weight: self.kernels.pack_convolution(
                weight, self.packer.dtype, stride, padding, input.shape
            ),
        )
        bias = self.bias
        if shift is not None:
            bias = shift[0] if bias is None else bias + shift[0]
        return self.kernels.convolve(input, packed, bias, stride, padding, add)

    def doubled(self, x: Tensor, user: nn.Module) -> Tensor:
        """Convolves x at twice its size (nearest neighbour), without the large map. For 3x3 kernels."""
        packed = self.packer.get(
            user,
            self.weight,
            lambda weight: [
                self.kernels.pack_convolution(part, self.packer.dtype, (1, 1), (1, 1), x.shape)
                for part in kernels.parity_weights(weight)
            ],
        )
        return self.kernels.convolve_doubled(x, packed, self.bias)


class PackedLinear(nn.Linear):
    """A linear layer whose weight is packed when it first runs. Inputs of any dtype; output in the packer's."""

    packer: Packer
    kernels: Kernels = cast(Kernels, kernels)

    def forward(self, input: Any, add: Tensor | None = None) -> Tensor:
        packed = self.packer.get(
            self, self.weight, lambda weight: self.kernels.pack_linear(weight, self.packer.dtype)
        )
        return self.kernels.multiply(input, packed, self.bias, add)

    def as_input(self, x: Any) -> Any:
        """Returns x as this layer, and others with its kernels, compute with it."""
        return self.kernels.as_input(x, self.packer.dtype)


class WideEmbedding(nn.Embedding):
    """An embedding that returns float32, whatever its file holds."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).float()
