"""Writes a model in another layout or precision: whole or not at all, over nothing, tensor by tensor."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ldm.checkpoints.formats.safetensors_file import DTYPES
from ldm.checkpoints.layouts.names import CLASSES, Component, component_configs, to_diffusers
from ldm.checkpoints.layouts.recognise import EMA_PREFIX, INPAINTING_CHANNELS
from ldm.checkpoints.load import (
    EMA_COUNTERS,
    SCHEDULE_BUFFERS,
    Ema,
    build_model,
    check_fit,
    load_into,
    use_vocabulary,
)
from ldm.checkpoints.reader import MODEL_INDEX, Checkpoint
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.encoders.modules import FrozenCLIPEmbedder
from ldm.modules.encoders.tokenizer import BEGIN, END
from ldm.util import InputError, part_beside, printable, without_leftovers, written_whole

Layout = Literal["compvis", "ckpt", "diffusers"]

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_NEVER_CAST = SCHEDULE_BUFFERS | EMA_COUNTERS
_FOLDER_VERSION = "0.20.0"  # of diffusers, whose names are written
_WEIGHTS: Mapping[Component, str] = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}
_TRANSFORMERS = ("text_encoder", "tokenizer")
_HASH = "modelspec.hash_sha256"
_PIECE = 2**20  # numbers that are cast and written at a time


def layout_for(out: str | os.PathLike[str]) -> Layout:
    """The layout that an output path asks for by its ending: .safetensors, .ckpt, or a folder for diffusers."""
    endings: dict[str, Layout] = {".safetensors": "compvis", ".ckpt": "ckpt"}
    return endings.get(Path(out).suffix.lower(), "diffusers")


def check_output(out: str | os.PathLike[str], to: Layout, ema: Ema | Literal["both"]) -> None:
    """That `out` can be written in the layout `to`, before anything is read; else an `InputError`."""
    path = Path(out)
    if to == "compvis" and path.suffix.lower() != ".safetensors":
        raise InputError(f"{printable(path)}: a file in the CompVis layout is safetensors; name it so")
    if to == "diffusers" and layout_for(path) != "diffusers":
        raise InputError(f"{printable(path)}: the diffusers layout is a folder; name one")
    if to == "diffusers" and ema == "both":
        raise InputError("a diffusers folder holds one set of weights; use --ema auto, on or off")
    empty_folder = to == "diffusers" and path.is_dir() and not path.is_symlink() and not os.listdir(path)
    if os.path.lexists(path) and not empty_folder:
        raise InputError(f"{printable(path)} exists already, and nothing is overwritten; choose another name")
    if not path.absolute().parent.is_dir():
        raise InputError(f"{printable(path.absolute().parent)} is no folder; make it first")


def convert(
    checkpoint: Checkpoint,
    config: Mapping[str, Any],
    out: str | os.PathLike[str],
    to: Layout,
    dtype: torch.dtype | None = None,
    ema: Ema | Literal["both"] = "auto",
) -> None:
    """Writes the model of a checked config with the weights of `checkpoint` (from `read_model`) to `out`.

    "compvis" is one safetensors file under CompVis's names, "ckpt" the same as torch saves it, "diffusers" a
    folder for `StableDiffusionPipeline.from_pretrained`. The weights are checked as if they were to run; the
    noise schedule is computed and never cast. `dtype` None keeps each weight's type. With `ema` "auto" the
    averaged weights are written as the weights if there are any, "both" keeps both sets. Only "ckpt" has all
    cast weights in memory at once. Raises `InputError`, and `OSError` if the disk says no.
    """
    check_output(out, to, ema)
    model = build_model(config)
    check_fit(model, checkpoint)
    load_into(model, checkpoint, ema="on" if ema == "both" else ema)
    averages: dict[str, Tensor] = {}
    if ema == "both":
        load_into(model, checkpoint, ema="off")
        averages = {k: v for k, v in checkpoint.state_dict.items() if k.startswith(EMA_PREFIX)}
    own = {key: value for key, value in model.state_dict().items() if not key.startswith(EMA_PREFIX)}
    tensors = {**own, **averages}
    if to == "diffusers":
        use_vocabulary(model, checkpoint.vocabulary)
        with without_leftovers(Path(out)), _folder_written_whole(Path(out)) as folder:
            _write_folder(folder, model, tensors, dtype)
        return
    with without_leftovers(Path(out)), written_whole(Path(out)) as part:
        if to == "ckpt":
            steps = {
                name: checkpoint.metadata[name] for name in ("global_step",) if name in checkpoint.metadata
            }
            state_dict = {key: _cast(key, value, dtype).contiguous() for key, value in tensors.items()}
            torch.save({**steps, "state_dict": state_dict}, part)
        else:
            write_safetensors(
                part, tensors, dtype, _model_spec(model, checkpoint, Path(out).stem, tensors, dtype)
            )


# --- one file -----------------------------------------------------------------------------------------------------


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype | None, metadata: Mapping[str, str]
) -> None:
    """Writes tensors one by one, cast to `dtype` unless None, large types first as other writers do.

    If `metadata` has a `modelspec.hash_sha256`, that is made the SHA-256 of the tensors' bytes.
    """
    write_as(path, tensors, {key: _type(key, tensor, dtype) for key, tensor in tensors.items()}, metadata)


def write_as(
    path: Path, tensors: Mapping[str, Tensor], types: Mapping[str, torch.dtype], metadata: Mapping[str, str]
) -> None:
    """`write_safetensors` with a type for each tensor."""
    order = sorted(tensors, key=lambda key: (-types[key].itemsize, key))
    entries: dict[str, Any] = {}
    end = 0
    for key in order:
        begin, end = end, end + tensors[key].numel() * types[key].itemsize
        entries[key] = {
            "dtype": _DTYPE_NAMES[types[key]],
            "shape": list(tensors[key].shape),
            "data_offsets": [begin, end],
        }
    sha = hashlib.sha256()
    with path.open("wb") as file:
        file.write(_header(entries, metadata))
        for key in order:
            for piece in tensors[key].detach().contiguous().reshape(-1).split(_PIECE):
                data = piece.to(types[key]).contiguous().view(torch.uint8).numpy().data
                sha.update(data)
                file.write(data)
        if _HASH in metadata:
            file.seek(0)
            file.write(_header(entries, {**metadata, _HASH: f"0x{sha.hexdigest()}"}))


def _header(entries: Mapping[str, Any], metadata: Mapping[str, str]) -> bytes:
    text = json.dumps({"__metadata__": dict(metadata), **entries}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _type(key: str, tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    if dtype is None or not tensor.is_floating_point() or key in _NEVER_CAST:
        return tensor.dtype
    return dtype


def _cast(key: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(_type(key, tensor, dtype))


def _model_spec(
    model: LatentDiffusion,
    checkpoint: Checkpoint,
    title: str,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype | None,
) -> dict[str, str]:
    """The metadata of a safetensors file: what the source said, and ModelSpec 1.0.1 for what v1 models are."""
    said = {name: str(value) for name, value in checkpoint.metadata.items()}
    if not isinstance(model.cond_stage_model, FrozenCLIPEmbedder):
        return {**said, "format": "pt"}
    side = model.image_size * model.first_stage_model.downsampling
    paints_in = model.model.diffusion_model.in_channels == INPAINTING_CHANNELS
    first = {
        part: next(_type(key, tensor, dtype) for key, tensor in tensors.items() if key.startswith(prefix))
        for part, prefix in (("unet", "model."), ("vae", "first_stage_model."))
    }
    return {
        "modelspec.title": title,
        **said,
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v1" + ("-inpainting" if paints_in else ""),
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.resolution": f"{side}x{side}",
        "modelspec.prediction_type": "epsilon",
        **{f"modelspec.{part}_dtype": str(kind).removeprefix("torch.") for part, kind in first.items()},
        _HASH: f"0x{0:064x}",
    }


# --- a folder -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _folder_written_whole(path: Path) -> Iterator[Path]:
    """Within it a folder is filled under the hidden name it yields; at its end `path` is the whole folder."""
    part = part_beside(path.absolute())
    part.mkdir()
    try:
        yield part
        if path.is_dir():
            path.rmdir()  # fails unless it is empty
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        os.rename(part, path)
    finally:
        if part.exists():
            shutil.rmtree(part, ignore_errors=True)


def _write_folder(
    folder: Path, model: LatentDiffusion, tensors: Mapping[str, Tensor], dtype: torch.dtype | None
) -> None:
    configs = component_configs(model)
    for name, extra in _descriptive(model).items():
        (folder / name).mkdir()
        file = "scheduler_config.json" if name == "scheduler" else "config.json"
        _write_json(folder / name / file, {**extra, **configs[name]})
    for part, weights in to_diffusers(tensors).items():
        with written_whole(folder / part / _WEIGHTS[part]) as file:
            write_safetensors(file, weights, dtype, {"format": "pt"})
    _write_tokenizer(folder / "tokenizer", model.cond_stage_model)
    _write_json(folder / MODEL_INDEX, _model_index(model))


def _descriptive(model: LatentDiffusion) -> dict[str, dict[str, Any]]:
    """What the configs of a folder say beside the settings that two models can differ in."""
    side = model.image_size
    tokens = component_configs(model)["text_encoder"]["vocab_size"]
    return {
        "unet": {**_class("UNet2DConditionModel"), "sample_size": side},
        "vae": {**_class("AutoencoderKL"), "sample_size": side * model.first_stage_model.downsampling},
        "text_encoder": {
            "architectures": ["CLIPTextModel"],
            "model_type": "clip_text_model",
            "bos_token_id": tokens - 2,
            "eos_token_id": tokens - 1,
            "pad_token_id": tokens - 1,
            "attention_dropout": 0.0,
        },
        "scheduler": {
            **_class("PNDMScheduler"),
            "skip_prk_steps": True,
            "set_alpha_to_one": False,
            "steps_offset": 1,
            "clip_sample": False,
        },
    }


def _class(name: str) -> dict[str, str]:
    return {"_class_name": name, "_diffusers_version": _FOLDER_VERSION}


def _model_index(model: LatentDiffusion) -> dict[str, Any]:
    paints_in = model.model.diffusion_model.in_channels == INPAINTING_CHANNELS
    classes = {**CLASSES, "scheduler": "PNDMScheduler", "tokenizer": "CLIPTokenizer"}
    return {
        **_class("StableDiffusionInpaintPipeline" if paints_in else "StableDiffusionPipeline"),
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
    _write_json(folder / "vocab.json", vocabulary)
    lines = "".join(f"{left} {right}\n" for left, right in merges)
    _write_text(folder / "merges.txt", f"#version: 0.2\n{lines}")
    special = {"bos_token": BEGIN, "eos_token": END, "pad_token": END, "unk_token": END}
    _write_json(folder / "special_tokens_map.json", special)
    _write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "CLIPTokenizer", "model_max_length": embedder.max_length, **special},
    )


def _write_json(path: Path, tree: Mapping[str, Any]) -> None:
    _write_text(path, json.dumps(tree, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def _write_text(path: Path, text: str) -> None:
    with written_whole(path) as part:
        part.write_text(text, encoding="utf-8", newline="\n")
