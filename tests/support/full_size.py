"""A full-size v1 checkpoint with weights rebuilt from key names, for speed, memory and loading tests."""

from __future__ import annotations

from pathlib import Path

import torch

from ldm.benchmark.weights import write_random_checkpoint
from ldm.checkpoints.configs import V1_CONFIG
from ldm.config import read_config


def write_checkpoint(path: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Writes an EMA-only checkpoint with every network key of a v1 model: 4.27 GB in float32."""
    write_random_checkpoint(path, read_config(V1_CONFIG), dtype)
    return path
