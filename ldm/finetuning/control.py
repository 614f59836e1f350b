"""Trains a ControlNet: an encoder that reads a hint image and steers a model that stays as it is (Zhang et al. 2023).

The network begins as a copy of the U-Net's encoder, followed by convolutions of zeros: at first it changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ldm.checkpoints.adapters.control import control_file, control_network, read_control
from ldm.checkpoints.layouts.control_names import PREFIX
from ldm.files import written_whole
from ldm.finetuning.batches import Batch
from ldm.finetuning.latents import Placed
from ldm.finetuning.module import FineTuning
from ldm.finetuning.parts import Groups
from ldm.images.hints import make_hint
from ldm.models.diffusion.control import Control, Unit
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.guidance import Conditioning
from ldm.modules.diffusionmodules.controlnet import ControlNet
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.ema import LitEma
from ldm.util import InputError, printable


def control_of(unet: UNetModel, channels: int) -> ControlNet:
    """Returns a new control network of RGB hints, float32, with the weights of a U-Net's encoder.

    It sees `channels` channels of latents, the first of the U-Net's own.
    """
    own_settings: dict[str, Any] = {"in_channels": channels, "time_cond_proj_dim": None}
    network = ControlNet(**{**unet.settings, **own_settings})
    weights, own = unet.state_dict(), network.state_dict()
    for name, value in own.items():
        if name in weights:
            value.copy_(weights[name][:, :channels] if name == "input_blocks.0.0.weight" else weights[name])
    return network


class ControlPart:
    """A ControlNet of a model, new or with the weights of the file `start`; averaged with `ema_decay`."""

    trains_text = False

    def __init__(
        self,
        model: LatentDiffusion,
        rate: float,
        start: str | None = None,
        ema_decay: float | None = None,
        dtype: torch.dtype | None = torch.float16,
    ) -> None:
        unet = cast(UNetModel, model.model.diffusion_model)
        model.requires_grad_(False)
        if start is None:
            self.network = control_of(unet, model.channels)
        else:
            file = read_control(control_file(start))
            if file.is_adapter or file.is_difference or file.pools:
                raise InputError(
                    f"--start {printable(start)} is not a plain ControlNet; give one that train controlnet wrote"
                )
            self.network = control_network(file, unet, torch.float32)
        for parameter in self.network.requires_grad_(True).parameters():
            parameter.data = parameter.data.clone()  # those of a mapped file may not change
        self.module = torch.nn.ModuleDict({"network": self.network})
        if ema_decay is not None:
            self.module["ema"] = LitEma(self.network, ema_decay)
        self.rate, self.dtype = rate, dtype

    def groups(self) -> Groups:
        return [{"params": list(self.network.parameters()), "lr": self.rate}]

    def before_step(self) -> None:
        pass

    def after_step(self) -> None:
        if "ema" in self.module:
            self.module["ema"](self.network)

    def write(self, path: Path, notes: Mapping[str, str]) -> None:
        """Writes the network under its authors' names."""
        from ldm.checkpoints.formats.write import types_for, write_safetensors

        if "ema" in self.module:
            cast(LitEma, self.module["ema"]).copy_to(self.network)
        state = {
            PREFIX + name: value.detach().cpu().contiguous()
            for name, value in self.network.state_dict().items()
        }
        with written_whole(path) as part:
            write_safetensors(part, state, types_for(state, self.dtype, keep=frozenset()), dict(notes))


class ControlTuning(FineTuning):
    """Trains on the images' hints: those of files, or made of the images themselves."""

    def conditioning(self, batch: Batch) -> Conditioning:
        return self._controlled(self.prompts(batch.captions), zip(batch.images, batch.mirrored, strict=True))

    def sampled(self, context: Tensor, images: Sequence[Placed]) -> Conditioning:
        """The samples have the hints of the first images."""
        return self._controlled(context, ((images[i % len(images)], 0) for i in range(len(context))))

    def _controlled(self, context: Tensor, images: Iterable[tuple[Placed, int]]) -> Conditioning:
        hints = torch.stack([self._hint(image, mirrored) for image, mirrored in images])
        network = cast(ControlPart, self.part).network
        features = network.read_hint(hints.to(self.device))
        unit = Unit(network, features, [1.0] * (len(network.zero_convs) + 1))
        return {"c_crossattn": [context], "control": Control((unit,))}

    def _hint(self, image: Placed, mirrored: int) -> Tensor:
        """The hint of an image, [3, H, W] in [0, 1], cut as it is."""
        pixels = self.placer.cut(self.placer.hint(image), image.placement, bool(mirrored), "black")
        return torch.from_numpy(make_hint(self.settings.hint, pixels)).permute(2, 0, 1)
