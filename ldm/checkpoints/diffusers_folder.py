"""Writes a model as a folder for diffusers' `StableDiffusionPipeline.from_pretrained`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoints.formats.write import types_for, write_safetensors
from ldm.checkpoints.layouts.names import CLASSES, SMALL_CLASSES, Component, to_diffusers
from ldm.checkpoints.layouts.settings import component_configs
from ldm.checkpoints.model_files import MODEL_INDEX
from ldm.files import written_whole
from ldm.models.autoencoder import SmallAutoencoder
from ldm.models.diffusion.ddpm import LatentDiffusion, LatentEditDiffusion, LatentInpaintDiffusion
from ldm.modules.encoders.modules import FrozenCLIPEmbedder
from ldm.modules.encoders.tokenizer import BEGIN, END

_VERSION = "0.20.0"  # of diffusers, whose names are written
_WEIGHTS: Mapping[Component, str] = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}
_PIPELINES: Mapping[type[LatentDiffusion], str] = {
    LatentInpaintDiffusion: "StableDiffusionInpaintPipeline",
    LatentEditDiffusion: "StableDiffusionInstructPix2PixPipeline",
}
_TRANSFORMERS = ("text_encoder", "tokenizer")


def write_folder(
    folder: Path, model: LatentDiffusion, tensors: Mapping[str, Tensor], dtype: torch.dtype | None
) -> None:
    """Fills an existing empty `folder` with the weights `tensors` of `model`, cast to `dtype` unless it is None.

    A model that diffusers cannot describe is a `CheckpointError`. Raises `OSError`.
    """
    configs = component_configs(model)
    for name, extra in _descriptive(model).items():
        (folder / name).mkdir()
        file = "scheduler_config.json" if name == "scheduler" else "config.json"
        write_json(folder / name / file, {**extra, **configs[name]})
    for part, weights in to_diffusers(tensors).items():
        with written_whole(folder / part / _WEIGHTS[part]) as file:
            write_safetensors(file, weights, types_for(weights, dtype), {"format": "pt"})
    _write_tokenizer(folder / "tokenizer", model.cond_stage_model)
    write_json(folder / MODEL_INDEX, _model_index(model))


def _descriptive(model: LatentDiffusion) -> dict[str, dict[str, Any]]:
    """The entries of a folder's configs other than the settings in which two models can differ."""
    side = model.image_size
    tokens = component_configs(model)["text_encoder"]["vocab_size"]
    return {
        "unet": {**class_entries("UNet2DConditionModel"), "sample_size": side},
        "vae": {
            **class_entries(_vae_class(model)),
            "sample_size": side * model.first_stage_model.downsampling,
        },
        "text_encoder": {
            "architectures": ["CLIPTextModel"],
            "model_type": "clip_text_model",
            "bos_token_id": tokens - 2,
            "eos_token_id": tokens - 1,
            "pad_token_id": tokens - 1,
            "attention_dropout": 0.0,
        },
        "scheduler": _scheduler(model),
    }


def _scheduler(model: LatentDiffusion) -> dict[str, Any]:
    """PLMS as in the original; without signal at the last timestep, DDIM that begins there."""
    name = _scheduler_class(model)
    begins = {"timestep_spacing": "trailing"} if model.zero_terminal_snr else {"skip_prk_steps": True}
    return {
        **class_entries(name),
        **begins,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "clip_sample": False,
    }


def _scheduler_class(model: LatentDiffusion) -> str:
    return "DDIMScheduler" if model.zero_terminal_snr else "PNDMScheduler"


def _vae_class(model: LatentDiffusion) -> str:
    small = isinstance(model.first_stage_model, SmallAutoencoder)
    return (SMALL_CLASSES if small else CLASSES)["vae"]


def class_entries(name: str) -> dict[str, str]:
    return {"_class_name": name, "_diffusers_version": _VERSION}


def _model_index(model: LatentDiffusion) -> dict[str, Any]:
    classes = {
        **CLASSES,
        "vae": _vae_class(model),
        "scheduler": _scheduler_class(model),
        "tokenizer": "CLIPTokenizer",
    }
    return {
        **class_entries(_PIPELINES.get(type(model), "StableDiffusionPipeline")),
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        **{
            name: ["transformers" if name in _TRANSFORMERS else "diffusers", kind]
            for name, kind in sorted(classes.items())
        },
    }


def _write_tokenizer(folder: Path, embedder: FrozenCLIPEmbedder) -> None:
    vocabulary, merges = embedder.reader.table()
    folder.mkdir()
    write_json(folder / "vocab.json", vocabulary)
    lines = "".join(f"{left} {right}\n" for left, right in merges)
    _write_text(folder / "merges.txt", f"#version: 0.2\n{lines}")
    special = {"bos_token": BEGIN, "eos_token": END, "pad_token": END, "unk_token": END}
    write_json(folder / "special_tokens_map.json", special)
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "CLIPTokenizer", "model_max_length": embedder.max_length, **special},
    )


def write_json(path: Path, tree: Mapping[str, Any]) -> None:
    _write_text(path, json.dumps(tree, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def _write_text(path: Path, text: str) -> None:
    with written_whole(path) as part:
        part.write_text(text, encoding="utf-8", newline="\n")
