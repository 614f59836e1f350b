"""A copy of a model's weights on disk in the types in which they run: half the bytes to read at the next start."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ldm import __version__
from ldm.checkpoints.formats.detect import CheckpointError, reading
from ldm.checkpoints.formats.read import Checkpoint, read_checkpoint
from ldm.checkpoints.formats.write import write_safetensors
from ldm.checkpoints.layouts.recognise import EMA_PREFIX
from ldm.checkpoints.load import Ema, load_into
from ldm.files import without_leftovers, written_whole
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.util import printable

logger = logging.getLogger(__name__)

_NAMES = r"[0-9a-f]{32}\.safetensors"  # of all that `cached_file` gives


def cached_file(folder: Path, files: Sequence[Path], choice: str) -> Path:
    """The cached file for the weights of `files` under a `choice` of them.

    Its name is a hash of each file's path, size, time and inode, for the choice and for this version, so that
    what is found under it is never out of date.
    """
    text = json.dumps([__version__, choice, identity(files)])
    return folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.safetensors"


def identity(files: Sequence[Path]) -> list[tuple[str, int, int, int]]:
    """Identifies the content of `files` without reading it: each file's path, size, time and inode.

    A file that is missing is a `CheckpointError`.
    """
    return [_identity(path) for path in files]


def _identity(path: Path) -> tuple[str, int, int, int]:
    with reading(path):
        state = os.stat(path)
        return str(path.resolve()), state.st_size, state.st_mtime_ns, state.st_ino


def through_cache(
    path: Path,
    model: LatentDiffusion,
    checkpoint: Checkpoint,
    ema: Ema,
    mmap: bool,
    halved: Callable[[LatentDiffusion], Collection[str]],
    rounded: Collection[str] = (),
) -> tuple[Checkpoint, Ema]:
    """The checkpoint and the choice of weights to load into `model`: the cached weights, made if they are missing.

    The cache holds the weights whose keys `halved` gives in bf16, and those of the keys `rounded` as int8. Where
    it can be neither read nor made, this is `checkpoint` and `ema`.
    """
    own = {key: value.shape for key, value in model.state_dict().items() if not key.startswith(EMA_PREFIX)}
    cached = read_cached(path, checkpoint, own, mmap)
    if cached is None:
        load_into(model, checkpoint, None, ema)
        weights = {key: value for key, value in model.state_dict().items() if key in own}
        halves = halved(model)
        types = {key: torch.bfloat16 if key in halves else value.dtype for key, value in weights.items()}
        write_cached(path, weights, types, rounded)
        cached = read_cached(path, checkpoint, own, mmap)
    return (checkpoint, ema) if cached is None else (cached, "off")


def read_cached(
    path: Path, checkpoint: Checkpoint, shapes: Mapping[str, torch.Size], mmap: bool
) -> Checkpoint | None:
    """`checkpoint` with the cached weights instead of its own, or None if there are none that can be read.

    They must be exactly the tensors of `shapes`; a file with others is removed as one that is damaged.
    """
    if not path.exists():
        return None
    try:
        cached = read_checkpoint(path, mmap).state_dict
        if {key: tensor.shape for key, tensor in cached.items()} != shapes:
            raise CheckpointError(f"{printable(path)}: holds other weights than this model has")
        return replace(checkpoint, state_dict=cached)
    except (CheckpointError, OSError) as error:
        logger.warning("the cached weights cannot be used and are written again: %s", printable(error))
        path.unlink(missing_ok=True)
        return None


def write_cached(
    path: Path,
    weights: Mapping[str, torch.Tensor],
    types: Mapping[str, torch.dtype],
    rounded: Collection[str] = (),
) -> None:
    """Keeps weights in their types for the next start, whole or not at all; a full disk is only logged."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with without_leftovers(path, _NAMES), written_whole(path, overwrite=True) as part:
            write_safetensors(part, weights, types, {"format": "pt"}, rounded)
    except OSError as error:
        logger.warning("the weights could not be cached in %s: %s", printable(path.parent), error.strerror)
        return
    logger.info("weights cached in %s (%.1f GB)", printable(path), path.stat().st_size / 1e9)
