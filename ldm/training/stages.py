"""The stages of training the bundled model, each from its config to the file that the next one reads."""

from __future__ import annotations

import difflib
import logging
import math
import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_type_hints

import numpy as np
import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, nn
from torch.utils.data import DataLoader
from yaml import YAMLError

from ldm.checkpoints.formats.read import read_checkpoint
from ldm.data.captions import caption
from ldm.data.dataset import render_many
from ldm.data.scenes import scene_at
from ldm.data.vocabulary import train_vocabulary
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.keys import COND_STAGE_PREFIX, FIRST_STAGE_PREFIX
from ldm.modules.encoders.modules import FrozenCLIPEmbedder
from ldm.places import find
from ldm.training.autoencoder import AutoencoderTraining, crop_batches, latent_scale, start_sharp, to_pixels
from ldm.training.diffusion import DiffusionTraining, encode_latents, noise_batches
from ldm.training.export import export, save_atomically
from ldm.training.quality import accuracies, judge, load_reader, save_reader, train_reader
from ldm.training.runs import (
    Batches,
    MakeBatch,
    Optimisation,
    RunSettings,
    fit,
    last_state,
    load_state,
    make_trainer,
)
from ldm.training.text import TextTraining, caption_batches
from ldm.util import InputError, instantiate_from_config, printable

logger = logging.getLogger(__name__)

_OF_THE_COMMAND = ("run.logdir", "run.steps", "run.max_time", "run.bar")  # options, or of another section
AUTOENCODER, TEXT, LATENTS = "autoencoder.pt", "text.pt", "latents.npy"


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
        if self.max_time is not None and not re.fullmatch(r"\d+:\d\d:\d\d:\d\d", self.max_time):
            raise InputError(
                f"--max_time is {printable(self.max_time)}; write DD:HH:MM:SS, such as 00:00:05:00"
            )
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
        params: Any = OmegaConf.to_container(read_config(Path(self.config.model)).model)["params"]  # type: ignore[index]
        text = params["cond_stage_config"]["params"]
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
        self, module: pl.LightningModule, make: MakeBatch, validation: DataLoader | None = None
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


def read_config(path: Path, changes: Sequence[str] = ()) -> DictConfig:
    """Reads the YAML at `path` with dotted changes such as `training.batch_size=32`, each of a known setting."""
    path = find(path)
    try:
        config = OmegaConf.load(path)
        if not isinstance(config, DictConfig):
            raise InputError(f"the config {printable(path)} is not a mapping")
        changed = OmegaConf.from_dotlist(list(changes))
    except (FileNotFoundError, IsADirectoryError):
        raise InputError(f"there is no config {printable(path)}") from None
    except (OSError, YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        reason = " ".join(printable(error).split())[:200]
        raise InputError(
            f"the config {printable(path)}, or a change to it, cannot be read: {reason}"
        ) from None
    known = _settings(config)
    for change in changes:
        name, sign, _ = change.partition("=")
        if not sign:
            raise InputError(f"{printable(change)} is not a change; write SETTING=VALUE")
        _check_setting(printable(name), OmegaConf.select(changed, name), known)
    return OmegaConf.merge(config, changed)  # type: ignore[return-value]


def _settings(config: DictConfig) -> dict[str, tuple[type, ...]]:
    """Returns the types of all settings that a stage's config can have, by their dotted names."""
    known: dict[str, tuple[type, ...]] = {"training.start_from": (str,)}
    for section, of in (("training.optimisation", Optimisation), ("run", RunSettings)):
        if OmegaConf.select(config, section) is not None:
            hints = get_type_hints(of)
            known |= {
                f"{section}.{field.name}": get_args(hint) if isinstance(hint, UnionType) else (hint,)
                for field in fields(of)
                for hint in [hints[field.name]]
            }

    def walk(node: Any, prefix: str) -> None:
        for key, value in node.items():
            if isinstance(value, DictConfig):
                walk(value, f"{prefix}{key}.")
            else:
                known.setdefault(f"{prefix}{key}", (type(value),))

    walk(config, "")
    return {name: kinds for name, kinds in known.items() if name not in _OF_THE_COMMAND}


def _check_setting(name: str, value: Any, known: Mapping[str, tuple[type, ...]]) -> None:
    if name not in known:
        last = {full.rpartition(".")[2]: full for full in known}
        close = [last[name.rpartition(".")[2]]] if name.rpartition(".")[2] in last else []
        close = close or difflib.get_close_matches(name, known, 1)
        raise InputError(
            f"unknown setting {name}; "
            + (f"did you mean {close[0]}?" if close else f"choose from {', '.join(sorted(known))}")
        )
    kind, *others = known[name]
    if value is None and type(None) in others:
        return
    if kind in (int, float):
        numbers = int if kind is int else int | float
        least = 1 if kind is int and not name.endswith("warm_up_steps") else 0
        if isinstance(value, bool) or not isinstance(value, numbers) or not least <= value < math.inf:
            what = "a whole number" if kind is int else "a number"
            raise InputError(f"{name} is {printable(value)}; give {what} of {least} or more")
    elif kind is str and not isinstance(value, str):
        raise InputError(f"{name} is {printable(value)}; give a text")


def train_autoencoder(stage: Stage) -> None:
    """Trains on rendered scenes -> `autoencoder.pt`: weights and the scale factor of the latents."""
    options = stage.config.training
    images = stage.rendered("train", stage.config.data.train)
    fresh = stage.rendered("fresh", stage.config.data.validation)
    model = instantiate_from_config(stage.model_config()["first_stage_config"])
    start_sharp(model)
    stage.start(model, FIRST_STAGE_PREFIX)
    module = AutoencoderTraining(model, stage.optimisation, options.kl_weight)
    whole_from = round(stage.optimisation.steps * (1 - options.whole_share))
    make = crop_batches(images, options.batch_size, options.crop, whole_from)
    stage.train(module, make, DataLoader(to_pixels(fresh), batch_size=16))  # type: ignore[arg-type]
    scale = latent_scale(model.eval(), fresh)
    save_atomically({"state_dict": model.state_dict(), "scale_factor": scale}, stage.logdir / AUTOENCODER)
    logger.info("write scale_factor: %.5f into %s", scale, stage.config.model)


def train_text(stage: Stage) -> None:
    """Trains on captions -> `text.pt`, the weights of the text encoder, and its vocabulary if that is missing."""
    options, cond_stage = stage.config.training, stage.model_config()["cond_stage_config"]
    _ensure_vocabulary(Path(cond_stage["params"]["version"]), cond_stage["params"]["tokens"])
    embedder = instantiate_from_config(cond_stage).train().requires_grad_(True)
    stage.start(embedder, COND_STAGE_PREFIX)
    tokenize = _tokenizer(embedder)
    module = TextTraining(embedder.transformer, cond_stage["params"]["width"], stage.optimisation)
    held_out = Batches(caption_batches(tokenize, "heldout", 500), seed=1)
    validation = DataLoader([next(iter(held_out))], batch_size=None)  # type: ignore[arg-type]
    stage.train(module, caption_batches(tokenize, "train", options.batch_size), validation)
    save_atomically({"state_dict": embedder.state_dict()}, stage.logdir / TEXT)


def _ensure_vocabulary(folder: Path, tokens: int, captions: int = 20000) -> None:
    if (folder / "vocab.json").is_file():
        return
    rng = np.random.default_rng(0)
    train_vocabulary((caption(scene_at(i, "train"), rng) for i in range(captions)), tokens, folder)


def _tokenizer(embedder: FrozenCLIPEmbedder) -> Callable[[Sequence[str]], Tensor]:
    return lambda texts: torch.tensor(embedder.reader(list(texts), max_length=embedder.max_length))


def write_latents(stage: Stage) -> None:
    """Encodes rendered scenes with `autoencoder.pt` -> `latents.npy`."""
    model = instantiate_from_config(stage.model_config()["first_stage_config"]).eval()
    model.load_state_dict(load_state(stage.logdir / AUTOENCODER)["state_dict"])
    images = stage.rendered("train", stage.config.data.train)
    encode_latents(model, images, stage.logdir / LATENTS)


def _latent_diffusion(stage: Stage) -> LatentDiffusion:
    """Returns the model with its trained parts; raises `InputError` if the scale factor is of another autoencoder."""
    autoencoder, text = load_state(stage.logdir / AUTOENCODER), load_state(stage.logdir / TEXT)
    model = LatentDiffusion(**stage.model_config())
    if abs(model.scale_factor / autoencoder["scale_factor"] - 1) > 1e-3:
        raise InputError(
            f"{printable(stage.config.model)} has scale_factor {model.scale_factor}, but this autoencoder's "
            f"latents need {autoencoder['scale_factor']:.5f}: write that into the config"
        )
    model.first_stage_model.load_state_dict(autoencoder["state_dict"])
    model.cond_stage_model.load_state_dict(text["state_dict"])
    return model


def _diffusion_module(stage: Stage, model: LatentDiffusion) -> DiffusionTraining:
    options = stage.config.training
    return DiffusionTraining(model, stage.optimisation, options.ema_decay, options.min_snr_gamma)


def train_diffusion(stage: Stage) -> None:
    """Trains with `latents.npy`, `autoencoder.pt` and `text.pt` -> a state with the U-Net and its averages."""
    model, options = _latent_diffusion(stage), stage.config.training
    stage.start(model.model, "model.")
    moments = np.load(stage.logdir / LATENTS, mmap_mode="r")
    shares = options.drop_prompts, options.mismatched_prompts
    make = noise_batches(moments, "train", options.batch_size, model.num_timesteps, *shares)
    stage.train(_diffusion_module(stage, model), make)


def export_model(stage: Stage) -> None:
    """Writes the last state of the diffusion stage as the checkpoint that the config names under `export`."""
    module = _diffusion_module(stage, _latent_diffusion(stage))
    path, step = last_state(stage.logdir / "diffusion")
    module.load_state_dict(load_state(path)["state_dict"])
    export(module.model, module.ema, step, Path(stage.config.export))
    logger.info("step %d is in %s", step, stage.config.export)


def train_judge(stage: Stage) -> None:
    """Trains on rendered scenes -> the reader of images that the config names under `export`."""
    data, path = stage.config.data, Path(stage.config.export)
    unseen = data.test  # scenes of each split that the reader is not trained on
    fresh, held_out = stage.rendered("fresh", unseen), stage.rendered("heldout", data.heldout)
    scenes = [scene_at(i, "train") for i in range(data.train)]
    scenes += [scene_at(i, "heldout") for i in range(unseen, data.heldout)]
    images = np.concatenate([stage.rendered("train", data.train), held_out[unseen:]])
    save_reader(train_reader(images, scenes, stage.optimisation, stage.config.training.batch_size), path)
    reader = load_reader(path)
    for split, pictures in (("fresh", fresh), ("heldout", held_out[:unseen])):
        truth = [scene_at(i, split) for i in range(unseen)]
        logger.info("right on %s scenes: %s", split, accuracies(judge(reader, pictures), truth))


STAGES: dict[str, Callable[[Stage], None]] = {
    "autoencoder": train_autoencoder,
    "text": train_text,
    "latents": write_latents,
    "diffusion": train_diffusion,
    "export": export_model,
    "judge": train_judge,
}
