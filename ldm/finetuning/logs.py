"""Logs of a training: a table of losses, their plot, sample images, and the end that a user asks for."""

from __future__ import annotations

import csv
import logging
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image
from torch import Tensor

from ldm.files import written_whole
from ldm.finetuning.latents import Placed
from ldm.finetuning.module import FineTuning
from ldm.images.pixels import to_uint8
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.plots import available, new_figure, save_figure
from ldm.runs.progress import Interrupts
from ldm.util import InputError

if TYPE_CHECKING:
    from pytorch_lightning.loggers import Logger

logger = logging.getLogger(__name__)

_COLUMNS = ("step", "loss", "learning_rate", "seconds")
_SAMPLE_STEPS, _SAMPLE_SCALE = 20, 7.5


class LossTable(pl.Callback):
    """Appends step, loss, learning rate and seconds to a CSV file, and to Lightning's logger if there is one.

    What is in the file after the step that the run begins with goes. The loss is the mean over all batches of a step.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._losses, self._before = path, list[Tensor](), 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._started, self._step = time.monotonic(), trainer.global_step
        if not trainer.is_global_zero:
            return
        rows = read_losses(self.path) if self.path.exists() else []
        kept = [row for row in rows if row[0] <= self._step]
        self._before = kept[-1][3] if kept else 0.0
        with written_whole(self.path, overwrite=True) as part, part.open("w", newline="") as file:
            csv.writer(file).writerows([_COLUMNS, *kept])

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._losses.append(outputs["loss"].detach() * trainer.accumulate_grad_batches)
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        mean, self._losses = torch.stack(self._losses).mean(), []
        loss = float(cast("Tensor", trainer.strategy.reduce(mean)))
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        seconds = self._before + time.monotonic() - self._started
        for log in trainer.loggers:
            log.log_metrics({"loss": loss, "learning_rate": rate}, self._step)
        if trainer.is_global_zero:
            with self.path.open("a", newline="") as file:
                csv.writer(file).writerow([self._step, f"{loss:.9g}", f"{rate:.6g}", f"{seconds:.2f}"])


class FiniteLoss(pl.Callback):
    """Ends a training whose loss is not finite, in all processes, before the weights change."""

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        if not trainer.strategy.reduce_boolean_decision(bool(torch.isfinite(loss.detach())), all=True):
            raise InputError(
                f"the loss is {float(loss.detach()):g} at step {trainer.global_step + 1}; the last good state is "
                "kept: lower --learning_rate, or use --precision full, and add --resume"
            )


def read_losses(path: Path) -> list[tuple[int, float, float, float]]:
    """Reads the rows of a table of losses: step, loss, learning rate, seconds; an incomplete last row is left out."""
    with path.open(newline="") as file:
        rows = [row for row in csv.reader(file) if len(row) == len(_COLUMNS) and row[0] != _COLUMNS[0]]
    return [(int(step), float(loss), float(rate), float(seconds)) for step, loss, rate, seconds in rows]


def plot_losses(table: Path, image: Path) -> Path | None:
    """Plots the losses of a table with their running mean as `image`.png, and returns it.

    None without losses, or without matplotlib.
    """
    rows = read_losses(table)
    if not rows or not available():
        return None
    figure = new_figure(8, 4.5)
    steps, losses = (np.array(values) for values in list(zip(*rows, strict=True))[:2])
    span = max(1, len(losses) // 20)
    mean = np.convolve(losses, np.full(span, 1 / span), "valid")
    axes = figure.add_subplot(xlabel="step", ylabel="loss")
    axes.plot(steps, losses, linewidth=0.6, alpha=0.4, label="step")
    axes.plot(steps[span - 1 :], mean, label=f"mean of {span} steps")
    axes.legend()
    return save_figure(figure, image)[0]


def check_tensorboard(wanted: bool) -> None:
    """Raises `InputError` if TensorBoard's files are wanted and its package is missing."""
    if wanted and find_spec("tensorboard") is None:
        raise InputError("--tensorboard needs the package tensorboard; run: pip install tensorboard")


def tensorboard(folder: Path) -> Logger:
    """Returns Lightning's logger of TensorBoard, which writes below `folder`."""
    from pytorch_lightning.loggers import TensorBoardLogger

    return TensorBoardLogger(folder, name="tensorboard", version="")


class StopAsked(pl.Callback):
    """Ends the training after the step in which a signal arrived."""

    def __init__(self, interrupts: Interrupts) -> None:
        self.interrupts = interrupts

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        received = self.interrupts.received is not None
        if trainer.strategy.reduce_boolean_decision(received, all=False):
            trainer.should_stop = True


class Samples(pl.Callback):
    """Draws the prompts of the settings every so many steps into a row of images, `step-000500.png`."""

    def __init__(self, module: FineTuning, images: Sequence[Placed], folder: Path) -> None:
        self.module, self.settings, self.folder = module, module.settings, folder
        self.size = max(image.placement.size for image in images)
        self.images = [image for image in images if image.placement.size == self.size]
        self._drawn = -1

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        drawn = step == self._drawn or not trainer.is_global_zero
        if drawn or (step % self.settings.sample_steps and step != self.settings.steps):
            return
        self._drawn = step
        self.folder.mkdir(parents=True, exist_ok=True)
        with written_whole(self.folder / f"step-{step:06d}.png", overwrite=True) as part:
            Image.fromarray(self.draw(pl_module.device)).save(part, "PNG")

    @torch.no_grad()
    def draw(self, device: torch.device) -> np.ndarray:
        """Returns the images of all prompts next to one another, uint8 [H, n * W, 3], of the same noise each time."""
        model, prompts = self.module.model, list(self.settings.sample_prompt)
        width, height = (side // model.first_stage_model.downsampling for side in self.size)
        rng = np.random.default_rng(self.settings.seed)
        noise = rng.standard_normal((len(prompts), model.channels, height, width), dtype=np.float32)
        guided, empty = (
            self.module.sampled(model.get_learned_conditioning(texts, self.settings.clip_skip), self.images)
            for texts in (prompts, [""] * len(prompts))
        )
        latents, _ = DDIMSampler(model).sample(
            S=_SAMPLE_STEPS, batch_size=len(prompts), shape=noise.shape[1:], conditioning=guided, verbose=False,
            unconditional_conditioning=empty, unconditional_guidance_scale=_SAMPLE_SCALE,
            x_T=torch.from_numpy(noise).to(device),
        )  # fmt: skip
        decoder = next(model.first_stage_model.parameters())
        images = to_uint8(model.decode_first_stage(latents.to(decoder.dtype)))
        return np.concatenate(list(images), axis=1)
