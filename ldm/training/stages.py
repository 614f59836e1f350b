"""The stages of training the bundled model, each from its config to the weights that the next one reads."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import DataLoader

from ldm.data.dataset import render_many
from ldm.training.autoencoder import AutoencoderTraining, crop_batches, latent_scale, to_pixels
from ldm.training.runs import Batches, Optimisation, RunSettings, fit, last_state, make_trainer
from ldm.util import InputError, instantiate_from_config, printable

logger = logging.getLogger(__name__)

AUTOENCODER, TEXT, LATENTS = "autoencoder.pt", "text.pt", "latents.npy"


@dataclass(frozen=True)
class Stage:
    """One stage as it was asked for: its config, where its files go, and how it runs."""

    config: DictConfig
    logdir: Path
    resume: bool
    max_time: str | None
    bar: bool

    def settings(self, name: str) -> RunSettings:
        """How the Trainer runs, from the config's `run` section; states go to a folder of the stage's own."""
        return RunSettings(
            logdir=self.logdir / name,
            steps=self.config.training.optimisation.steps,
            max_time=self.max_time,
            bar=self.bar,
            **self.config.run,
        )

    def model_config(self) -> dict[str, Any]:
        """The inference config that the stage's config names under `model`."""
        return plain(read_config(Path(self.config.model)).model)

    def rendered(self, split: str, count: int) -> np.ndarray:
        """The pictures of the first scenes of a split (uint8 [N, H, W, 3]), drawn where they are missing."""
        workers = os.cpu_count() or 1
        return np.load(render_many(count, split, self.config.data.folder, workers), mmap_mode="r")

    def train(self, name: str, module: pl.LightningModule, make: Any, validation: DataLoader | None) -> None:
        """Trains `module` on the numbered batches of `make`, from the last state if the run is resumed."""
        settings = self.settings(name)
        state, step = last_state(settings.logdir) if self.resume else (None, 0)
        train = Batches(make, first=step * settings.accumulate).loader()
        fit(make_trainer(settings), module, train, validation, state)


def read_config(path: Path, changes: Sequence[str] = ()) -> DictConfig:
    """The YAML at `path` with dotted changes such as `training.batch_size=32`."""
    if not path.is_file():
        raise InputError(f"there is no config {printable(path)}")
    config = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(list(changes)))
    assert isinstance(config, DictConfig)
    return config


def plain(config: DictConfig) -> dict[str, Any]:
    """The config as nested dictionaries and lists."""
    return OmegaConf.to_container(config, resolve=True)  # pyright: ignore[reportReturnType]


def save_atomically(value: Any, path: Path) -> None:
    """`torch.save` that leaves either the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(path.suffix + ".tmp")
    torch.save(value, part)
    os.replace(part, path)


def train_autoencoder(stage: Stage) -> None:
    """Rendered scenes -> `autoencoder.pt`: weights and the scale factor of the latents."""
    options = stage.config.training
    optimisation = Optimisation(**options.optimisation)
    images = stage.rendered("train", stage.config.data.train)
    fresh = stage.rendered("fresh", stage.config.data.validation)
    model = instantiate_from_config(stage.model_config()["params"]["first_stage_config"])
    module = AutoencoderTraining(model, optimisation, options.kl_weight)
    whole_from = round(optimisation.steps * (1 - options.whole_share))
    make = crop_batches(images, options.batch_size, options.crop, whole_from)
    stage.train("autoencoder", module, make, DataLoader(to_pixels(fresh), batch_size=16))
    scale = latent_scale(model.eval(), fresh)
    save_atomically({"state_dict": model.state_dict(), "scale_factor": scale}, stage.logdir / AUTOENCODER)
    logger.info("scale factor %.5f; weights in %s", scale, stage.logdir / AUTOENCODER)


STAGES = {"autoencoder": train_autoencoder}


def run(name: str, config: DictConfig, logdir: Path, resume: bool, max_time: str | None, bar: bool) -> None:
    """Runs one stage; its products go to `logdir`."""
    STAGES[name](Stage(config, logdir, resume, max_time, bar))
