"""Shared by all training runs: numbered batches, the optimiser, progress lines, states to resume from."""

from __future__ import annotations

import itertools
import logging
import re
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint, Timer
from pytorch_lightning.loggers import Logger
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ldm.files import written_whole
from ldm.lr_scheduler import LambdaLinearScheduler
from ldm.util import InputError, printable

logger = logging.getLogger(__name__)
logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)  # it advertises other packages
warnings.filterwarnings("ignore", message=".*LeafSpec")  # about its calls of torch
warnings.filterwarnings(
    "ignore", message="Checkpoint directory .* exists and is not empty"
)  # losses are there
warnings.filterwarnings("ignore", message="Found .* module.s. in eval mode")  # intended: what is frozen is

STATE = "last.ckpt"
MakeBatch = Callable[[int, np.random.Generator], Any]


class Batches(IterableDataset[Any]):
    """An endless sequence of numbered batches; batch i depends only on (seed, i), so a run can be resumed.

    `make(i, rng)` builds batch i; `first` is the number to start with. Of several processes each has its share: they
    take the batches in turn, as one process that accumulates as many would.
    """

    def __init__(self, make: MakeBatch, seed: int = 0, first: int = 0) -> None:
        self.make, self.seed, self.first = make, seed, first

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        start, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        if torch.distributed.is_initialized():
            world = torch.distributed.get_world_size()
            start, stride = start * world + torch.distributed.get_rank(), stride * world
        for number in itertools.count(self.first + start, stride):
            yield self.make(number, np.random.default_rng([self.seed, number]))

    def loader(self, num_workers: int = 0) -> DataLoader[Any]:
        """Returns the batches as a DataLoader; workers keep the order."""
        return DataLoader(self, batch_size=None, num_workers=num_workers)


@dataclass(frozen=True)
class Optimisation:
    """AdamW: `warm_up_steps` of linear warm-up, then a linear decay to `f_min` times the rate at `steps`."""

    learning_rate: float
    steps: int
    warm_up_steps: int = 100
    f_min: float = 0.0
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0

    def multiplier(self) -> LambdaLinearScheduler:
        """Returns the learning-rate multiplier of this run."""
        return LambdaLinearScheduler([self.warm_up_steps], [self.f_min], [1.0], [0.01], [self.steps])

    def adamw(self, parameters: Iterable[torch.nn.Parameter]) -> tuple[AdamW, LambdaLR]:
        """Returns the optimiser and its schedule."""
        optimizer = AdamW(parameters, lr=self.learning_rate, betas=self.betas, weight_decay=self.weight_decay)
        schedule = self.multiplier().schedule
        # A plain function keeps the schedule out of the checkpoint: a resumed run may have another length.
        return optimizer, LambdaLR(optimizer, lambda step: schedule(step))

    def configure(self, parameters: Iterable[torch.nn.Parameter]) -> OptimizerLRSchedulerConfig:
        """Returns the result of `LightningModule.configure_optimizers`."""
        optimizer, scheduler = self.adamw(parameters)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class ProgressLines(pl.Callback):
    """Logs step, loss and time left every `seconds`, for runs without a terminal."""

    def __init__(self, seconds: float = 30.0) -> None:
        self.seconds = seconds

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.first_step, self.started = trainer.global_step, time.monotonic()
        self.reported = self.started

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now, done = time.monotonic(), trainer.global_step - self.first_step
        if now - self.reported < self.seconds or not done:
            return
        self.reported = now
        seconds = (now - self.started) / done
        left = (trainer.max_steps - trainer.global_step) * seconds / 60
        values = "  ".join(f"{name} {float(value):.4g}" for name, value in trainer.callback_metrics.items())
        logger.info(
            "step %d of %d  %s  %.2f s a step, %.1f min left",
            trainer.global_step, trainer.max_steps, values, seconds, left,
        )  # fmt: skip


class WholeStates(TorchCheckpointIO):
    """Writes a state whole or not at all, straight to the disk: Lightning's own way holds all of it in memory."""

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with written_whole(path, overwrite=True) as part:
                torch.save(checkpoint, part)
        except RuntimeError as error:  # torch's writer hides the system's error
            if isinstance(error.__context__, OSError) or "inline_container" in str(error):
                raise InputError(
                    f"the state cannot be written to {printable(path)}; make room on the disk, and add --resume"
                ) from None
            raise


class TimeLimit(Timer):
    """Ends training after a time; that of the run before, which is resumed, does not count."""

    def state_dict(self) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class RunSettings:
    """Where and how long a run trains. `max_time` is "DD:HH:MM:SS" from its start; `precision` is as in Lightning.

    `device` is "auto", or one as torch names it; of its kind `devices` on each of `num_nodes` machines share a step.
    """

    logdir: Path
    steps: int
    precision: str = "bf16-mixed"
    accumulate: int = 1
    clip: float | None = 1.0
    max_time: str | None = None
    checkpoint_steps: int = 500
    validate_steps: int | None = None
    bar: bool = False
    device: str = "auto"
    devices: int = 1
    num_nodes: int = 1


def check_time(text: str | None) -> None:
    """Raises `InputError` if `text` is given and not a time such as `RunSettings.max_time`."""
    if text is not None and not re.fullmatch(r"\d+:\d\d:\d\d:\d\d", text):
        raise InputError(f"--max_time is {printable(text)}; write DD:HH:MM:SS, such as 00:00:05:00")


def make_trainer(
    settings: RunSettings, callbacks: Iterable[pl.Callback] = (), logger: Logger | None = None
) -> pl.Trainer:
    """Creates a Lightning trainer that keeps its last state in `logdir/last.ckpt`."""
    keep = ModelCheckpoint(
        dirpath=settings.logdir,
        filename=STATE.removesuffix(".ckpt"),
        every_n_train_steps=settings.checkpoint_steps,
        save_on_train_epoch_end=False,
        enable_version_counter=False,
    )
    progress = [] if settings.bar else [ProgressLines()]
    limit = [] if settings.max_time is None else [TimeLimit(settings.max_time)]
    accelerator, _, index = settings.device.partition(":")
    devices = [int(index)] if index else "auto" if accelerator == "auto" else 1
    shared = settings.devices * settings.num_nodes > 1
    return pl.Trainer(
        accelerator=accelerator,
        devices=settings.devices if shared else devices,
        num_nodes=settings.num_nodes,
        strategy="ddp_find_unused_parameters_true" if shared else "auto",
        default_root_dir=settings.logdir,
        max_steps=settings.steps,
        precision=settings.precision,  # pyright: ignore[reportArgumentType]
        accumulate_grad_batches=settings.accumulate,
        gradient_clip_val=settings.clip,
        val_check_interval=settings.validate_steps,
        limit_val_batches=None if settings.validate_steps else 0,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        plugins=[WholeStates()],
        callbacks=[keep, *progress, *limit, *callbacks],
        enable_progress_bar=settings.bar,
        enable_model_summary=False,
        logger=logger or False,
        log_every_n_steps=10,
    )


def load_state(path: Path) -> dict[str, Any]:
    """Loads the state that a stage saved at `path`; raises `InputError` if there is none."""
    if not path.is_file():
        raise InputError(f"{printable(path)} does not exist: run the stage that makes it first")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, UnpicklingError, ValueError, EOFError) as error:
        logger.debug("%s", printable(error))
        raise InputError(f"{printable(path)} is not a file that a stage has saved") from None


def last_state(logdir: Path) -> tuple[Path, int]:
    """Returns the state in `logdir` to resume from and its optimiser step."""
    return logdir / STATE, int(load_state(logdir / STATE)["global_step"])


def fit(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    train: DataLoader[Any],
    validation: DataLoader[Any] | None = None,
    resume: Path | None = None,
) -> None:
    """Trains to the end of the run or of its time, and saves the state that a later run can resume from."""
    trainer.fit(module, train, validation, ckpt_path=resume)
    trainer.save_checkpoint(Path(trainer.default_root_dir) / STATE, weights_only=False)
