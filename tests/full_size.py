"""A full-size v1 checkpoint with weights rebuilt from key names, for speed, memory and loading tests."""

from __future__ import annotations

import zlib
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch

from tests.golden_data import WEIGHT_PREFIXES, keys


def fast_weight(key: str, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
    """Like `golden_data.weight_of` in scale, but quick to draw: for runs whose figures nobody compares."""
    rng = np.random.default_rng(zlib.crc32(key.encode()))
    z = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
    if len(shape) >= 2:
        return (z / float(np.sqrt(np.prod(shape[1:])))).to(dtype)
    return (0.02 * z if key.endswith("bias") else 1 + 0.02 * z).to(dtype)


def write_checkpoint(path: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Writes an EMA-only checkpoint with every network key of a v1 model: 4.27 GB in float32."""
    state_dict = OrderedDict(
        (key, fast_weight(key, shape, dtype))
        for key, shape in keys("keys_v1.json").items()
        if key.startswith(WEIGHT_PREFIXES) and not key.endswith("position_ids")
    )
    torch.save({"state_dict": state_dict, "global_step": 470000}, path)
    return path
