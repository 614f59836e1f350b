"""The stages of training the bundled model, each from its config to the file that the next one reads."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ldm.data.captions import caption
from ldm.data.scenes import scene_at
from ldm.data.vocabulary import train_vocabulary
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.keys import COND_STAGE_PREFIX, FIRST_STAGE_PREFIX
from ldm.modules.encoders.modules import FrozenCLIPEmbedder
from ldm.training.autoencoder import AutoencoderTraining, crop_batches, latent_scale, start_sharp, to_pixels
from ldm.training.diffusion import DiffusionTraining, encode_latents, noise_batches
from ldm.training.distillation import distil
from ldm.training.export import export, save_atomically
from ldm.training.quality import accuracies, judge, load_reader, save_reader, train_reader
from ldm.training.runs import Batches, last_state, load_state
from ldm.training.stage import Stage
from ldm.training.taesd import train_taesd
from ldm.training.text import TextTraining, caption_batches
from ldm.util import InputError, instantiate_from_config, printable

logger = logging.getLogger(__name__)

AUTOENCODER, TEXT, LATENTS = "autoencoder.pt", "text.pt", "latents.npy"


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
    validation = DataLoader[Any]([next(iter(held_out))], batch_size=None)  # type: ignore[arg-type]
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
    for split, shown in (("fresh", fresh), ("heldout", held_out[:unseen])):
        truth = [scene_at(i, split) for i in range(unseen)]
        logger.info("right on %s scenes: %s", split, accuracies(judge(reader, shown), truth))


STAGES: dict[str, Callable[[Stage], None]] = {
    "autoencoder": train_autoencoder,
    "text": train_text,
    "latents": write_latents,
    "diffusion": train_diffusion,
    "export": export_model,
    "distil": distil,
    "judge": train_judge,
    "taesd": train_taesd,
}
