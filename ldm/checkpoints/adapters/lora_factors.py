"""LoRAs that are computed instead of trained: from the difference of two models, or from another LoRA.

The best approximation of a matrix by one of rank r keeps its r largest singular values (Eckart and Young 1936).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from ldm.checkpoints.adapters.lora_deltas import Parts, weight_change
from ldm.checkpoints.adapters.lora_names import TEXT, UNET, written_names
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.util import InputError

Factors = tuple[Tensor, Tensor]  # down [r, in, ...] and up [out, r, ...], whose product is the change


def factors_of(change: Tensor, rank: int) -> Factors:
    """Returns the factors of the best approximation of a weight's change (linear or convolution) in float32.

    They are of `rank`, or less for a smaller weight. A convolution's first factor has its kernel.
    """
    matrix = change.float().flatten(1)
    decompose = cast("Callable[..., tuple[Tensor, Tensor, Tensor]]", torch.linalg.svd)
    left, values, right = decompose(matrix, full_matrices=False)
    rank = min(rank, len(values))
    root = values[:rank].sqrt()
    kernel = [1] * (change.dim() - 2)
    down = (root[:, None] * right[:rank]).reshape(rank, *change.shape[1:])
    return down.contiguous(), (left[:, :rank] * root).reshape(len(change), rank, *kernel).contiguous()


def extracted(
    tuned: Mapping[str, Tensor], base: LatentDiffusion, rank: int, conv_rank: int = 0
) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors, in kohya's names, of the LoRA that turns the model `base` into one with the state `tuned`.

    Layers that do not differ are left out, and so are 3x3 convolutions without a `conv_rank`. Norms and biases cannot
    be in a LoRA. Models of other shapes, or without any difference, are an `InputError`.
    """
    names, found = written_names(base, "kohya"), False
    for path, layer in cast("Iterator[tuple[str, nn.Module]]", base.named_modules()):
        if not path.startswith((UNET, TEXT)) or not isinstance(layer, nn.Linear | nn.Conv2d):
            continue
        own, other = layer.weight.detach(), tuned[f"{path}.weight"]
        if own.shape != other.shape:
            raise InputError(f"the two models differ in the shape of {path}; they must be of one kind")
        change = other.float() - own.float()
        wide = change.dim() == 4 and change.shape[2] > 1
        if not change.any() or not (conv_rank if wide else rank):
            continue
        found = True
        yield from _named(names[path], factors_of(change, conv_rank if wide else rank))
    if not found:
        raise InputError("the two models do not differ in any layer that a LoRA can change")


def resized(layers: Mapping[str, Parts], base: LatentDiffusion, rank: int) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors, in kohya's names, of a LoRA of `rank` that is nearest to one with other parts."""
    names = written_names(base, "kohya")
    for path, parts in layers.items():
        weight = base.get_submodule(path).weight
        assert isinstance(weight, Tensor)
        change = weight_change(parts, weight)
        if change is not None:
            yield from _named(names[path], factors_of(change, rank))


def _named(name: str, factors: Factors) -> Iterator[tuple[str, Tensor]]:
    down, up = factors
    yield f"{name}.lora_down.weight", down
    yield f"{name}.lora_up.weight", up
    yield f"{name}.alpha", torch.tensor(float(len(down)))
