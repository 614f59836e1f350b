"""Images whose opposite edges meet: each convolution sees what is across the edge, where it saw zeros."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from ldm.modules.diffusionmodules import model as autoencoder
from ldm.modules.diffusionmodules import openaimodel as unet
from ldm.runtime.int8 import Silu
from ldm.util import is_list

Axes = Literal["none", "x", "y", "both"]


class Seamless:
    """Makes networks wrap around, or lets them end at their edges as they did; their weights stay as they are.

    A layer's input is extended by a margin from across the edge, and the margin of its output, in which the zeros
    outside are seen, is cut off. So every kind of layer, packed or not, computes as it did.
    """

    def __init__(self) -> None:
        self._done: tuple[Axes, list[nn.Module]] = "none", []
        self._handles: list[RemovableHandle] = []

    def apply(self, networks: Iterable[nn.Module], axes: Axes) -> None:
        """Has `networks` wrap around along the axes: "x" joins left and right, "y" top and bottom, or "both"."""
        networks = list(networks) if axes != "none" else []
        if self._done == (axes, networks):
            return
        for handle in self._handles:
            handle.remove()
        self._handles = [handle for network in networks for handle in _hooked(network, axes)]
        self._done = axes, networks


def _margins(layer: nn.Module) -> tuple[int, int] | None:
    """By how much a layer's input is extended, and its output cut; None for one that sees no neighbours."""
    if isinstance(layer, unet.Upsample | autoencoder.Upsample):
        return 1, 2
    if isinstance(layer, autoencoder.Downsample):
        return 2, 1
    if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3) and layer.padding == (1, 1):
        return layer.stride[0], 1
    return None


def _hooked(network: nn.Module, axes: Axes) -> Iterable[RemovableHandle]:
    wraps = (axes in ("y", "both"), axes in ("x", "both"))
    resizing = unet.Upsample | autoencoder.Upsample | autoencoder.Downsample
    inner = {id(layer.conv) for layer in network.modules() if isinstance(layer, resizing)}
    for layer in network.modules():
        margins = _margins(layer)
        if margins is None or id(layer) in inner:
            continue
        before, after = ([margin * on for on in wraps] for margin in margins)

        def extend(
            module: nn.Module,
            args: tuple[Any, ...],
            kwargs: dict[str, Any],
            before: Any = before,
            after: Any = after,
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            x, *rest = args
            return (_extended(x, before), *(_grown(value, after) for value in rest)), {
                name: _grown(value, after) for name, value in kwargs.items()
            }

        def cut(module: nn.Module, args: Any, out: Tensor, after: Any = after) -> Tensor:
            rows, columns = (
                slice(margin, side - margin) for margin, side in zip(after, out.shape[2:], strict=True)
            )
            return out[..., rows, columns]

        yield layer.register_forward_pre_hook(extend, with_kwargs=True)
        yield layer.register_forward_hook(cut)


def _extended(x: Any, margins: Any) -> Any:
    rows, columns = margins
    if isinstance(x, Silu):
        return Silu(_extended(x.x, margins))
    return F.pad(x, (columns, columns, rows, rows), mode="circular")


def _grown(value: Any, margins: Any) -> Any:
    """An argument of a layer in the size of its extended output: a map that is added to it, or its size."""
    if isinstance(value, Tensor):
        return _extended(value, margins) if value.dim() == 4 else value
    if is_list(value):
        return [side + 2 * margin for side, margin in zip(value, margins, strict=True)]
    return value
