"""The inputs of a benchmark: weights generated from key names, the same as a diffusers folder, and an image."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ldm.checkpoints.convert import convert
from ldm.checkpoints.load import build_model
from ldm.checkpoints.model_files import read_model
from ldm.files import without_leftovers, written_whole
from ldm.images.writer import encode_png, publish
from ldm.models.keys import COND_STAGE_PREFIX, FIRST_STAGE_PREFIX, UNET_PREFIX

NETWORKS = (UNET_PREFIX, FIRST_STAGE_PREFIX, COND_STAGE_PREFIX)
IMAGE_SIDE = 512


def random_weight(key: str, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Returns the weight of a key: the same on every machine, and of a scale that keeps activations finite.

    Matrices and kernels have variance 1 / inputs, scales are around 1 and biases around 0.
    """
    rng = np.random.default_rng(zlib.crc32(key.encode()))
    z = torch.from_numpy(rng.standard_normal(tuple(shape), dtype=np.float32))
    if len(shape) >= 2:
        return (z / float(np.sqrt(np.prod(shape[1:])))).to(dtype)
    return (0.02 * z if key.endswith("bias") else 1 + 0.02 * z).to(dtype)


def write_random_checkpoint(
    path: Path, config: Mapping[str, Any], dtype: torch.dtype = torch.float32
) -> None:
    """Writes a checkpoint with every weight of a checked config's networks: 4.27 GB in float32 for v1."""
    weights = OrderedDict(
        (key, random_weight(key, value.shape, dtype))
        for key, value in build_model(config).state_dict().items()
        if key.startswith(NETWORKS) and value.is_floating_point()
    )
    with without_leftovers(path), written_whole(path) as part:
        torch.save({"state_dict": weights, "global_step": 470_000}, part)  # the step of the published weights


def write_image(path: Path) -> None:
    """Writes a starting image: colour ramps with a little noise."""
    down, across = np.mgrid[0:IMAGE_SIDE, 0:IMAGE_SIDE] / IMAGE_SIDE
    ramps = np.stack([down, across, 1 - down], axis=-1)
    noise = np.random.default_rng(0).normal(0, 0.05, ramps.shape)
    publish(path, encode_png((255 * (ramps + noise)).clip(0, 255).astype(np.uint8)))


def prepare(
    config: Mapping[str, Any], ckpt: str, cache: Path, peer_dtypes: Sequence[str], picture: bool
) -> dict[str, Any]:
    """Makes files that the cache folder lacks; returns the paths of checkpoint, image and peer folders (by dtype).

    Without a `ckpt` the weights are random.
    """
    cache.mkdir(parents=True, exist_ok=True)
    used = Path(ckpt) if ckpt else cache / f"random-{_digest(config)}.ckpt"
    if not ckpt and not used.exists():
        write_random_checkpoint(used, config)
    start = cache / "start.png"
    if picture and not start.exists():
        write_image(start)
    folders = {name: _peer_folder(config, used, cache, name) for name in peer_dtypes}
    return {"ckpt": str(used), "picture": str(start), "folders": folders}


def _peer_folder(config: Mapping[str, Any], ckpt: Path, cache: Path, dtype: str) -> str:
    """Writes the checkpoint as a folder that diffusers loads a pipeline from; a changed file gets a new one."""
    found = ckpt.stat()
    origin = [config, str(ckpt.resolve()), found.st_size, found.st_mtime_ns]
    folder = cache / f"diffusers-{dtype}-{_digest(origin)}"
    if not folder.exists():
        convert(read_model(ckpt), config, folder, "diffusers", getattr(torch, dtype))
    return str(folder)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
