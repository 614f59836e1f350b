"""The loop's view of a training: one step's loss, and the optimiser."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any, cast

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ldm.finetuning.batches import Batch
from ldm.finetuning.latents import Placed, Placer
from ldm.finetuning.objective import Objective, usual_target
from ldm.finetuning.parts import Groups, LoraPart, NetworkPart, Part
from ldm.finetuning.settings import Settings
from ldm.lr_scheduler import LambdaLinearScheduler
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.guidance import Conditioning
from ldm.util import InputError

_KEPT = 4096  # encoded prompts


class Prompts:
    """Encodes captions; those of a text encoder that is not trained are encoded once."""

    def __init__(self, model: LatentDiffusion, clip_skip: int, trained: bool) -> None:
        self.model, self.clip_skip, self.trained = model, clip_skip, trained
        self._kept: OrderedDict[str, Tensor] = OrderedDict()

    def __call__(self, captions: list[str]) -> Tensor:
        """Returns the context of captions [N, tokens, width]."""
        if self.trained:
            return self.model.get_learned_conditioning(captions, self.clip_skip)
        missing = [caption for caption in dict.fromkeys(captions) if caption not in self._kept]
        if missing:
            with torch.no_grad():
                self._kept |= zip(
                    missing, self.model.get_learned_conditioning(missing, self.clip_skip), strict=True
                )
        context = torch.stack([self._kept[caption] for caption in captions])
        while len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return context


class FineTuning(pl.LightningModule):
    """Trains a `Part` of a model. Only the part is saved and moved by Lightning: the model is not a submodule.

    `placer` cuts images, for kinds that need more of them than their latents.
    """

    placer: Placer

    def __init__(self, model: LatentDiffusion, part: Part, settings: Settings) -> None:
        super().__init__()
        self.part, self.settings, self.trained = part, settings, part.module
        self._model = (model,)
        self.prompts = Prompts(model, settings.clip_skip, part.trains_text)
        self.objective = Objective(settings.min_snr_gamma, settings.debiased, cast(Any, settings.loss))

    @property
    def model(self) -> LatentDiffusion:
        """The model that the part belongs to."""
        return self._model[0]

    def setup(self, stage: str) -> None:
        self.model.to(self.device)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        moved = {
            name: value.to(device) for name, value in batch._asdict().items() if isinstance(value, Tensor)
        }
        return batch._replace(**moved)

    def conditioning(self, batch: Batch) -> Conditioning:
        """Returns what the U-Net is given besides the noised latents."""
        self.part.before_step()
        return self.prompts(batch.captions)

    def sampled(self, context: Tensor, images: Sequence[Placed]) -> Conditioning:
        """Returns what the U-Net is given for samples of a context [N, ...], among `images` of their size."""
        return context

    def loss(self, batch: Batch) -> Tensor:
        """Returns the mean of the batch's weighted losses."""
        cond = self.conditioning(batch)
        latents = self.model.get_first_stage_encoding(batch.latents)
        target = self._kept(batch, latents) if self.settings.class_target == "model" else None
        return (
            batch.weights * self.objective(self.model, latents, batch.t, batch.noise, cond, target)
        ).mean()

    @torch.no_grad()
    def _kept(self, batch: Batch, latents: Tensor) -> Tensor:
        """Returns targets that are, for images of the class, what the model predicted before the training.

        So it learns not to forget (Li and Hoiem 2016): images alone would also change what the class looks like.
        """
        target = usual_target(self.model, latents, batch.t, batch.noise).clone()
        general = [index for index, image in enumerate(batch.images) if image.example.regular]
        if general:
            assert isinstance(self.part, LoraPart | NetworkPart)  # other kinds have no such setting
            t = batch.t[general]
            with self.part.original():
                context = self.prompts([batch.captions[index] for index in general])
                x = self.model.q_sample(latents[general], t, batch.noise[general])
                target[general] = self.model.apply_model(x, t, context).to(target)
        return target

    def training_step(self, batch: Batch) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss.detach(), batch_size=len(batch.captions), logger=False)
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.part.after_step()

    def configure_gradient_clipping(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
        """Clips as Lightning does, which refuses to for fused optimisers."""
        if self.settings.clip:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, self.settings.clip)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = make_optimizer(self.part.groups(), self.settings)
        schedule = LambdaLR(optimizer, lambda step: rate_multiplier(self.settings, step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def check_optimizer(name: str) -> None:
    """Raises `InputError` if an optimiser's package is missing."""
    if name == "adamw8bit" and find_spec("bitsandbytes") is None:
        raise InputError(
            "--optimizer adamw8bit needs the package bitsandbytes; run: pip install bitsandbytes"
        )


def make_optimizer(groups: Groups, settings: Settings) -> Optimizer:
    """Returns the optimiser that the settings name, for parameters in groups with their learning rates."""
    if settings.optimizer == "adafactor":
        return torch.optim.Adafactor(groups, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    if settings.optimizer == "adamw8bit":
        eight_bit: Any = import_module("bitsandbytes.optim")
        return eight_bit.AdamW8bit(groups, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    return torch.optim.AdamW(
        groups, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
    )


def rate_multiplier(settings: Settings, step: int) -> float:
    """Returns what the learning rates are multiplied by at `step`, from 0.

    With "constant" and "linear" as `LambdaLinearScheduler` has it, from 1e-6; "cosine" goes to 0 at the last step.
    """
    warm_up, steps = settings.warm_up_steps, settings.steps
    if settings.schedule == "cosine" and step >= warm_up:
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm_up) / max(1, steps - warm_up))))
    end = 0.0 if settings.schedule == "linear" else 1.0
    return LambdaLinearScheduler([warm_up], [end], [1.0], [1e-6], [steps])(step)
