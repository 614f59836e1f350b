"""A checkpoint's weights in the model of a config, ready to sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ldm import __version__
from ldm.checkpoints.cache import PackedWeights
from ldm.checkpoints.configs import config_for
from ldm.checkpoints.formats.read import Checkpoint
from ldm.checkpoints.hashing import file_sha256, files_sha256
from ldm.checkpoints.layouts.prediction import Choice
from ldm.checkpoints.load import Ema, build_model, check_fit, load_into, use_vocabulary
from ldm.checkpoints.model_files import model_files, read_model
from ldm.checkpoints.variants import suited
from ldm.config import read_config
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.places import find
from ldm.runtime.device import Precision, resolve_precision
from ldm.runtime.opaque import machine
from ldm.safety.load import find_safety_model, load_safety_model
from ldm.safety.screen import Screen
from ldm.util import need


def load_model(
    config: Mapping[str, Any],
    ckpt: str | Path,
    device: torch.device | str = "cpu",
    ema: Ema = "auto",
    mmap: bool = True,
    vae: str | Path | None = None,
    text_encoder: str | Path | None = None,
    dtype: torch.dtype | None = torch.float32,
    prediction: Choice = "auto",
    checkpoint: Checkpoint | None = None,
) -> LatentDiffusion:
    """The model of a checked config with the weights of a checkpoint in `dtype` (None: the file's), ready to sample.

    `ckpt` is a file or a folder of diffusers, `vae` and `text_encoder` files or folders with another part. The
    model is built without memory of its own and takes the checkpoint's tensors; see `ldm.checkpoints` for what
    is refused. The checkpoint states what it predicts, unless `prediction` does. `checkpoint` is what these files
    hold, if they have been read.
    """
    model = build_model(config)  # a fault of the config is named before anything is read
    checkpoint = checkpoint or read_model(ckpt, mmap, vae, text_encoder, prediction)
    if (own := suited(config, checkpoint)) is not config:
        model = build_model(own)
    check_fit(model, checkpoint)
    need(
        not model.zero_terminal_snr or torch.device(device).type != "mps",
        "a model with zero terminal SNR needs float64, which MPS has not; use --device cpu",
    )
    load_into(model, checkpoint, dtype, ema)
    use_vocabulary(model, checkpoint.vocabulary)
    if model.use_ema:  # sampling needs one set of weights, and `load_into` has chosen it
        model.use_ema = False
        del model.model_ema
    return model.eval().to(device)


def packed_weights(folder: Path, files: Sequence[Path], ema: Ema, precision: Precision) -> PackedWeights:
    """The packed weights, kept below a folder, of the model in `files` as this machine runs it."""
    return PackedWeights(folder, files, [*machine(), ema, precision.name])


class Pretrained(NamedTuple):
    """A model that is ready to sample: on its device, with its precision and what metadata records of it."""

    model: LatentDiffusion
    precision: Precision
    entries: Mapping[str, str]


def load_pretrained(
    path: str | Path,
    config: str | Path | None,
    device: torch.device,
    precision: str,
    ema: Ema,
    vae: str | Path | None,
    text_encoder: str | Path | None,
    prediction: Choice = "auto",
) -> Pretrained:
    """The model of a checkpoint whose content chooses the config; see `Pipeline.from_pretrained`."""
    ckpt = find(path)
    chosen = config or config_for(read_model(ckpt).state_dict)
    held = resolve_precision(precision, device)
    model = load_model(
        read_config(find(chosen)), ckpt, device, ema, True, vae, text_encoder, None, prediction
    )
    entries = {
        "Model hash": file_sha256(ckpt)[:10] if ckpt.is_file() else "",
        "Model": ckpt.stem if ckpt.is_file() and ckpt.stem != "model" else ckpt.absolute().parent.name,
        "Config": Path(chosen).stem,
        "Precision": held.name,
        "Version": f"ldm {__version__}",
    }
    if vae is not None:
        entries |= {"VAE": Path(vae).name, "VAE hash": files_sha256(model_files(vae, "vae"))[:10]}
    return Pretrained(model, held, entries)


def load_screen(device: torch.device) -> Screen:
    """The safety check on `device`; without its weights on this machine, one that checks nothing."""
    checker = find_safety_model()
    if checker is None:
        return Screen(None)
    flag = load_safety_model(checker, device)
    return Screen(flag, flag.side)
