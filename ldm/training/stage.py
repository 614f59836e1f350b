"""One stage of training: its config, the folder of its files, and how it runs."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.utils.data import DataLoader

from ldm.checkpoints.formats.read import read_checkpoint
from ldm.data.dataset import render_many
from ldm.places import find
from ldm.training.config import read_config
from ldm.training.runs import (
    Batches,
    MakeBatch,
    Optimisation,
    RunSettings,
    check_time,
    fit,
    last_state,
    make_trainer,
)
from ldm.util import InputError, printable


@dataclass(frozen=True)
class Stage:
    """One requested stage: its name and config, the folder of its files, and how it runs."""

    name: str
    config: DictConfig
    logdir: Path
    resume: bool = False
    max_time: str | None = None
    bar: bool = False

    def check(self) -> None:
        """Checks that the stage can begin, else raises `InputError`. Creates the folder of results."""
        if OmegaConf.select(self.config, "training.optimisation") is None:
            raise InputError(
                f"the config of {self.name} has no training.optimisation; give another with --base"
            )
        check_time(self.max_time)
        try:
            self.logdir.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.logdir).close()
        except OSError as error:
            raise InputError(
                f"--logdir {printable(self.logdir)} cannot be written to: {error.strerror}"
            ) from None
        if self.resume and "run" in self.config:
            last_state(self.logdir / self.name)

    @property
    def optimisation(self) -> Optimisation:
        """The `training.optimisation` section."""
        return Optimisation(**self.config.training.optimisation)

    def model_config(self) -> dict[str, Any]:
        """Returns the parameters of the model that the config names under `model`."""
        model: Any = OmegaConf.to_container(read_config(Path(self.config.model)).model)
        params: dict[str, Any] = model["params"]
        text: dict[str, Any] = params["cond_stage_config"]["params"]
        text["version"] = str(find(text["version"]))
        return params

    def rendered(self, split: str, count: int) -> np.ndarray:
        """Returns the images of the first scenes of a split (uint8 [N, H, W, 3]), rendered if missing."""
        workers = os.cpu_count() or 1
        return np.load(render_many(count, split, self.config.data.folder, workers), mmap_mode="r")

    def start(self, part: nn.Module, prefix: str) -> None:
        """Loads `part` from the checkpoint at `training.start_from`, if the config names one."""
        if path := self.config.training.get("start_from"):
            weights = read_checkpoint(path).state_dict
            part.load_state_dict({k[len(prefix) :]: v for k, v in weights.items() if k.startswith(prefix)})

    def train(
        self, module: pl.LightningModule, make: MakeBatch, validation: DataLoader[Any] | None = None
    ) -> None:
        """Trains `module` on the numbered batches of `make`, from the last state if the run is resumed."""
        settings = RunSettings(
            logdir=self.logdir / self.name,
            steps=self.optimisation.steps,
            max_time=self.max_time,
            bar=self.bar,
            **self.config.run,
        )
        state, step = last_state(settings.logdir) if self.resume else (None, 0)
        train = Batches(make, first=step * settings.accumulate).loader()
        fit(make_trainer(settings), module, train, validation, state)
