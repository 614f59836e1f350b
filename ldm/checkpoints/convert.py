"""Writes a model in another layout or precision: as a whole or not at all, and never over another file."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ldm.checkpoints.adapters.lora import LoraStack
from ldm.checkpoints.diffusers_folder import write_folder
from ldm.checkpoints.formats.read import Checkpoint
from ldm.checkpoints.formats.safetensors_file import HASH_ENTRY
from ldm.checkpoints.formats.write import types_for, write_safetensors, write_torch
from ldm.checkpoints.layouts.names import PREFIXES
from ldm.checkpoints.layouts.prediction import marks_of
from ldm.checkpoints.load import (
    EMA_COUNTERS,
    SCHEDULE_BUFFERS,
    Ema,
    build_model,
    check_fit,
    load_into,
    use_vocabulary,
)
from ldm.checkpoints.variants import suited
from ldm.files import part_beside, without_leftovers, written_whole
from ldm.models.diffusion.ddpm import LatentDiffusion, LatentEditDiffusion, LatentInpaintDiffusion
from ldm.models.keys import EMA_PREFIX
from ldm.modules.encoders.modules import FrozenCLIPEmbedder
from ldm.util import InputError, printable

_ARCHITECTURES: Mapping[type[LatentDiffusion], str] = {
    LatentInpaintDiffusion: "-inpainting",
    LatentEditDiffusion: "-edit",
}
Layout = Literal["compvis", "ckpt", "diffusers"]


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
        raise InputError(f"{printable(path.absolute().parent)} is not a folder; make it first")


def convert(
    checkpoint: Checkpoint,
    config: Mapping[str, Any],
    out: str | os.PathLike[str],
    to: Layout,
    dtype: torch.dtype | None = None,
    ema: Ema | Literal["both"] = "auto",
    loras: Sequence[tuple[str, float, float]] = (),
    rounded: Callable[[LatentDiffusion], Collection[str]] | None = None,
) -> None:
    """Writes the model of a checked config with the weights of `checkpoint` (from `read_model`) to `out`.

    "compvis" is one safetensors file under CompVis's names, "ckpt" the same as torch saves it, "diffusers" a
    folder for `StableDiffusionPipeline.from_pretrained`. The weights are checked as if they were to run; the
    noise schedule is computed and never cast. `dtype` None keeps each weight's type; the weights whose keys
    `rounded` gives are written as int8 with scales, which only "compvis" can. With `ema` "auto" the averaged weights
    are written as the weights if there are any, "both" keeps both sets. `loras` (file, weight of the U-Net, weight
    of the text encoder) are merged into the weights. Only "ckpt" has all cast weights in memory at once. Raises
    `InputError`, and `OSError`, which names `out`, if writing fails.
    """
    check_output(out, to, ema)
    model = build_model(suited(config, checkpoint))
    check_fit(model, checkpoint)
    load_into(model, checkpoint, ema="on" if ema == "both" else ema)
    averages: dict[str, Tensor] = {}
    if ema == "both":
        load_into(model, checkpoint, ema="off")
        averages = {k: v for k, v in checkpoint.state_dict.items() if k.startswith(EMA_PREFIX)}
    if loras:
        LoraStack(model).apply(loras)
    own = {key: value for key, value in model.state_dict().items() if not key.startswith(EMA_PREFIX)}
    tensors = {**own, **averages}
    if to != "diffusers":
        tensors |= marks_of(model)
    types = types_for(tensors, dtype, keep=SCHEDULE_BUFFERS | EMA_COUNTERS)
    if to == "diffusers":
        use_vocabulary(model, checkpoint.vocabulary)
        with naming(out), without_leftovers(Path(out)), folder_written_whole(Path(out)) as folder:
            write_folder(folder, model, tensors, dtype)
        return
    with naming(out), without_leftovers(Path(out)), written_whole(Path(out)) as part:
        if to == "ckpt":
            steps = {
                name: checkpoint.metadata[name] for name in ("global_step",) if name in checkpoint.metadata
            }
            state_dict = {key: value.to(types[key]).contiguous() for key, value in tensors.items()}
            write_torch(part, {**steps, "state_dict": state_dict})
        else:
            spec = _model_spec(model, checkpoint, Path(out).stem, types)
            write_safetensors(part, tensors, types, spec, rounded(model) if rounded else ())


@contextlib.contextmanager
def naming(out: str | os.PathLike[str]) -> Generator[None]:
    """Names `out` in an `OSError`: that of a full disk names no file, others a hidden one."""
    try:
        yield
    except OSError as error:
        error.filename = os.fspath(out)
        raise


@contextlib.contextmanager
def folder_written_whole(path: Path) -> Generator[Path]:
    """Yields a hidden folder to be filled; at the end it gets the name `path`, and after an error it is removed."""
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


def _model_spec(
    model: LatentDiffusion, checkpoint: Checkpoint, title: str, types: Mapping[str, torch.dtype]
) -> dict[str, str]:
    """The metadata of a safetensors file: those of the source, and ModelSpec 1.0.1 for a v1 model."""
    source = {name: str(value) for name, value in checkpoint.metadata.items()}
    if not isinstance(model.cond_stage_model, FrozenCLIPEmbedder):
        return {**source, "format": "pt"}
    side = model.image_size * model.first_stage_model.downsampling
    first = {
        part: next(kind for key, kind in types.items() if key.startswith(PREFIXES[part]))
        for part in ("unet", "vae")
    }
    return {
        "modelspec.title": title,
        **source,
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v1" + _ARCHITECTURES.get(type(model), ""),
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.resolution": f"{side}x{side}",
        "modelspec.prediction_type": {"eps": "epsilon"}.get(model.parameterization, model.parameterization),
        **{f"modelspec.{part}_dtype": str(kind).removeprefix("torch.") for part, kind in first.items()},
        HASH_ENTRY: f"0x{0:064x}",
    }
