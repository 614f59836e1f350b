"""Layers that keep their weights packed for the kernels that run them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from ldm.json_value import Json
from ldm.runtime import kernels, opaque

Forget = Callable[[Tensor], object]
Made = TypeVar("Made")


@dataclass(frozen=True, slots=True)
class _Kept:
    """The packed form of a weight, its size in bytes, and the tensors of a file that hold it, if it is from one."""

    weight: Tensor
    version: int
    made: Any
    size: int
    file: Sequence[Tensor]


class PackedFiles(Protocol):
    """Where packed weights are kept from one process to the next, under names."""

    def read(self, name: str) -> tuple[Json, list[Tensor]] | None:
        """Returns what was written under a name, with tensors that are views of a file; None if nothing was."""
        ...

    def write(self, name: str, described: Json, tensors: Sequence[Tensor]) -> None: ...

    def remove(self, name: str) -> None: ...


class _Named(NamedTuple):
    """A weight as the checkpoint has it, and its key."""

    weight: Tensor
    version: int
    key: str


class Packer:
    """Casts and packs weights, once for each layer, within a `budget` in bytes (None: no limit).

    Weights that do not fit are packed at each use. `forget` is called with each weight that was read, so that a
    file's pages can leave memory. With `files` the packed weights of `model`, as it is now, are kept there.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        forget: Forget,
        budget: int | None = None,
        files: PackedFiles | None = None,
        model: nn.Module | None = None,
    ):
        self.dtype = dtype
        self._forget = forget
        self._budget = budget
        self._kept: dict[nn.Module, _Kept] = {}
        self._passing: Sequence[Tensor] = ()  # of a file, in use, and too large to stay
        self._files = files
        named = () if files is None or model is None else model.named_parameters()
        self._names = {id(weight): _Named(weight, _version(weight), key) for key, weight in named}

    def get(
        self, user: nn.Module, weight: Tensor, make: Callable[[Tensor], Made], size: Sequence[int] = ()
    ) -> Made:
        """Returns `make(weight)` for `user`, cached until the weight is another object or was changed in place.

        `size` is that of the input, if the layout depends on it.
        """
        version = _version(weight)
        kept = self._kept.get(user)
        if kept is not None and kept.weight is weight and kept.version == version:
            return kept.made
        self._release(self._kept.pop(user, None))
        for tensor in self._passing:
            self._forget(tensor)
        made, file = self._made(user, weight, version, make, size)
        self._forget(weight)
        length = weight.numel() * _itemsize(made)
        fits = self._budget is None or length + self.size <= self._budget
        self._passing = () if fits else file
        if fits:
            self._kept[user] = _Kept(weight, version, made, length, file)
        return made

    def _made(
        self,
        user: nn.Module,
        weight: Tensor,
        version: int,
        make: Callable[[Tensor], Any],
        size: Sequence[int],
    ) -> tuple[Any, Sequence[Tensor]]:
        """Returns the packed form of a weight, from its file if there is one, and the tensors of that file."""
        named = self._names.get(id(weight))
        if self._files is None or named is None or named.weight is not weight or named.version != version:
            return make(weight), ()
        form = "x".join([type(user).__name__, *map(str, size)])
        name = f"{named.key}-{form}-{str(self.dtype).removeprefix('torch.')}"
        if (found := self._files.read(name)) is not None:
            try:
                return opaque.of_bytes(*found), found[1]
            except (AttributeError, LookupError, TypeError, ValueError, RuntimeError):
                self._files.remove(name)
        made = make(weight)
        self._files.write(name, *opaque.to_bytes(made))
        return made, ()

    @property
    def size(self) -> int:
        """The bytes of the cached weights."""
        return sum(kept.size for kept in list(self._kept.values()))  # others may drop some meanwhile

    def drop(self, module: nn.Module) -> None:
        """Frees the cached weights of the layers of `module`."""
        for layer in module.modules():
            self._release(self._kept.pop(layer, None))

    def _release(self, kept: _Kept | None) -> None:
        for tensor in () if kept is None else kept.file:
            self._forget(tensor)


def _version(weight: Tensor) -> int:
    return 0 if weight.is_inference() else weight._version


def _itemsize(made: Any) -> int:
    """Returns the bytes of a number of a packed weight: a tensor, several, or one with what belongs to it."""
    return made.dtype.itemsize if isinstance(made, Tensor) else _itemsize(made[0])


class Kernels(Protocol):
    """The functions that a layer with packed weights calls: `ldm.runtime.kernels` or `ldm.runtime.int8`.

    `as_input` and `norm_silu` give an input, or the SiLU of it normalised, in the form that `convolve` and `multiply`
    compute with; layers with the same kernels can share it. What they return is in the dtype of the packed weight.
    """

    def as_input(self, x: Any, dtype: torch.dtype) -> Any: ...

    def norm_silu(self, norm: Callable[..., Tensor], x: Tensor) -> Any: ...

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
            input.shape,
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
            x.shape,
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
