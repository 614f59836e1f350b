"""Low-rank changes of a model's layers that can be trained (LoRA, Hu et al. 2021; DoRA, Liu et al. 2024)."""

from __future__ import annotations

import math
import re
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.checkpoints.adapters.lora_names import TEXT, UNET
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.util import InputError

# what is changed, by the end of a layer's path: attention with its projections and feed-forward layers, then with
# a rank of their own the 3x3 convolutions around it
_ATTENTION = re.compile(
    r"transformer_blocks\.\d+\.(attn[12]\.(to_[qkv]|to_out\.0)|ff\.net\.(0\.proj|2))$|\.proj_(in|out)$"
)
_CONVOLUTIONS = re.compile(
    r"(in_layers\.2|emb_layers\.1|out_layers\.3|skip_connection|\.\d+\.op|\.\d+\.conv)$"
)
_TEXT = re.compile(r"layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])$")


class LoraLayer(nn.Module):
    """The trained change of one layer: alpha / rank * up(down(x)) is added to what the layer returns.

    It begins as no change: `up` is zero, `down` uniform as torch initialises layers. With `dora` the rows of the
    changed weight keep trained lengths, `magnitude` [out]. With `on` false the layer is what it was.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, rank: int, alpha: float, dora: bool = False) -> None:
        super().__init__()
        weight = layer.weight
        largest = largest_rank(layer)
        if rank > largest:
            raise InputError(
                f"the rank {rank} is larger than the layer's {largest}; give --rank {largest} or less"
            )
        self.on = True
        self.rank, self.scale = rank, alpha / rank
        self.alpha = alpha
        self.down = nn.Parameter(
            torch.empty(rank, *weight.shape[1:], dtype=torch.float32, device=weight.device)
        )
        self.up = nn.Parameter(torch.zeros(len(weight), rank, dtype=torch.float32, device=weight.device))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        self.magnitude = nn.Parameter(_row_norms(weight.detach().float())) if dora else None
        self._handle = layer.register_forward_hook(self._add)

    def _add(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        assert isinstance(layer, nn.Linear | nn.Conv2d)
        if not self.on:
            return output
        x = inputs[0]
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.down)
        if isinstance(layer, nn.Linear):  # the scale is applied where the tensor is small
            change = F.linear(self.scale * F.linear(x, self.down), self.up)
        else:
            inner = F.conv2d(x, self.down, None, layer.stride, layer.padding, layer.dilation)
            change = F.conv2d(self.scale * inner, self.up[:, :, None, None])
        if self.magnitude is None:
            return output + change.to(output.dtype)
        return self._with_magnitude(layer, output, change)

    def _with_magnitude(self, layer: nn.Linear | nn.Conv2d, output: Tensor, change: Tensor) -> Tensor:
        """DoRA, equation 5; the norm counts as a constant in the backward pass (section 4.3)."""
        assert self.magnitude is not None
        with torch.no_grad():
            norms = _row_norms(layer.weight.float() + self.difference().reshape(layer.weight.shape))
        ratio, bias = self.magnitude / norms, layer.bias
        shape = [1, -1, 1, 1] if isinstance(layer, nn.Conv2d) else [-1]
        straight = output if bias is None else output - bias.reshape(shape)
        result = ratio.reshape(shape) * (straight + change)
        return (result if bias is None else result + bias.reshape(shape)).to(output.dtype)

    def difference(self) -> Tensor:
        """Returns the change of the layer's weight, flattened to two axes."""
        return self.scale * (self.up @ self.down.flatten(1))

    def remove(self) -> None:
        """Takes the change off the layer."""
        self._handle.remove()


def largest_rank(layer: nn.Linear | nn.Conv2d) -> int:
    """Returns the rank above which a change of the layer would say nothing more."""
    return min(len(layer.weight), layer.weight[0].numel())


def _row_norms(weight: Tensor) -> Tensor:
    return cast("Tensor", torch.linalg.vector_norm(weight.flatten(1), dim=1))


def trained_layers(
    model: LatentDiffusion, unet: bool, text: bool, convolutions: bool
) -> Iterator[tuple[str, nn.Linear | nn.Conv2d, bool]]:
    """Yields path, layer and whether it is a 3x3 convolution, of the layers that LoRAs usually change."""
    for path, layer in cast("Iterator[tuple[str, nn.Module]]", model.named_modules()):
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            continue
        chosen = (
            (unet and path.startswith(UNET) and _ATTENTION.search(path))
            or (unet and convolutions and path.startswith(UNET) and _CONVOLUTIONS.search(path))
            or (text and path.startswith(TEXT) and _TEXT.search(path))
        )
        if chosen:
            yield path, layer, isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1)


class LoraLayers(nn.Module):
    """The trained changes of a model, by the paths of its layers."""

    def __init__(self, layers: Mapping[str, LoraLayer]) -> None:
        super().__init__()
        self.paths = dict(layers)
        for path, layer in layers.items():
            self.add_module(path.replace(".", "_"), layer)

    def of(self, prefix: str) -> list[LoraLayer]:
        """Returns the changes of the layers whose paths begin with `prefix`."""
        return [layer for path, layer in self.paths.items() if path.startswith(prefix)]

    @contextmanager
    def off(self) -> Generator[None, None, None]:
        """The model is what it was before, as long as this lasts."""
        for layer in self.paths.values():
            layer.on = False
        try:
            yield
        finally:
            for layer in self.paths.values():
                layer.on = True

    def remove(self) -> None:
        """Takes all changes off the model."""
        for layer in self.paths.values():
            layer.remove()


def usual_lora(
    model: LatentDiffusion,
    rank: int,
    alpha: float,
    conv_rank: int = 0,
    conv_alpha: float = 1.0,
    unet: bool = True,
    text: bool = False,
    dora: bool = False,
) -> LoraLayers:
    """Returns changes of the layers that LoRAs usually have, of the U-Net and the text encoder.

    3x3 convolutions have a rank and an alpha of their own.
    """
    layers = {
        path: LoraLayer(layer, *((conv_rank, conv_alpha) if is_conv else (rank, alpha)), dora)
        for path, layer, is_conv in trained_layers(model, unet, text, conv_rank > 0)
    }
    if not layers:
        raise InputError("this model has no layers that a LoRA could change")
    return LoraLayers(layers)


def whole_lora(model: LatentDiffusion, rank: int) -> LoraLayers:
    """Returns changes of all linear and convolution layers of the U-Net, of smaller ranks where these suffice."""
    layers: dict[str, LoraLayer] = {}
    for path, layer in cast("Iterator[tuple[str, nn.Module]]", model.model.diffusion_model.named_modules()):
        if isinstance(layer, nn.Linear | nn.Conv2d):
            own = min(rank, largest_rank(layer))
            layers[f"{UNET}{path}"] = LoraLayer(layer, own, float(own))
    return LoraLayers(layers)
