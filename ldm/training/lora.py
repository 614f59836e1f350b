"""Low-rank changes of a network's layers that can be trained, switched off, and written as a LoRA file."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from ldm.checkpoints.adapters.lora_names import written_names
from ldm.checkpoints.formats.write import write_safetensors
from ldm.files import written_whole
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.keys import UNET_PREFIX


class LowRank(nn.Module):
    """Adds up * down to a weight W [out, in, ...]: down [rank, in, ...], up [out, rank, 1, ...] (Hu et al. 2021).

    `up` begins as zeros, so that nothing changes at first. With `on` false the weight is W.
    """

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        self.on = True
        self.down = nn.Parameter(torch.empty(rank, *weight.shape[1:]))
        self.up = nn.Parameter(torch.zeros(len(weight), rank, *[1] * (weight.dim() - 2)))
        nn.init.normal_(self.down, std=1 / math.sqrt(weight[0].numel()))

    def forward(self, weight: Tensor) -> Tensor:
        if not self.on:
            return weight
        return weight + (self.up.flatten(1) @ self.down.flatten(1)).reshape(weight.shape)


class UNetLora:
    """A LoRA of `rank` on every linear and convolution layer of the U-Net of `model`, whose weights are frozen."""

    def __init__(self, model: LatentDiffusion, rank: int) -> None:
        self._model, self.rank = model, rank
        model.model.requires_grad_(False)
        layers = {
            name: layer
            for name, layer in model.model.diffusion_model.named_modules()
            if isinstance(layer, nn.Linear | nn.Conv2d)
        }
        names = written_names(model, "kohya")
        self.parts: dict[str, LowRank] = {}  # by the names of the layers in files
        for name, layer in layers.items():
            part = LowRank(layer.weight, rank)
            register_parametrization(layer, "weight", part)
            self.parts[names[f"{UNET_PREFIX}{name}"]] = part

    def parameters(self) -> list[nn.Parameter]:
        """Returns the parameters that are trained."""
        return [parameter for part in self.parts.values() for parameter in part.parameters()]

    @contextmanager
    def off(self) -> Generator[None, None, None]:
        """The U-Net is what it was before, as long as this lasts."""
        for part in self.parts.values():
            part.on = False
        try:
            yield
        finally:
            for part in self.parts.values():
                part.on = True

    def save(self, path: Path, metadata: Mapping[str, str]) -> None:
        """Writes the layers in float16 under the names of kohya's scripts, with their notes and `metadata`.

        Either the old file is left or the complete new one.
        """
        tensors: dict[str, Tensor] = {}
        for name, part in self.parts.items():
            tensors[f"{name}.lora_down.weight"] = part.down.detach().half()
            tensors[f"{name}.lora_up.weight"] = part.up.detach().half()
            tensors[f"{name}.alpha"] = torch.tensor(float(self.rank))
        notes = {
            "ss_network_module": "networks.lora",
            "ss_network_dim": str(self.rank),
            "ss_network_alpha": str(self.rank),
            "ss_output_name": path.stem,
            **metadata,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path, overwrite=True) as part_of_file:
            write_safetensors(part_of_file, tensors, None, notes)
