"""Writes a trained model as the small bundled checkpoint: averaged weights in half precision."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.checkpoints.formats.write import write_torch
from ldm.files import written_whole
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.keys import EMA_PREFIX
from ldm.modules.ema import LitEma


def save_atomically(value: Any, path: Path) -> None:
    """Writes with `write_torch`, but leaves either the old file or the complete new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path, overwrite=True) as part:
        write_torch(part, value)


def half_state(model: LatentDiffusion) -> OrderedDict[str, Tensor]:
    """Returns the model's state under its published names, weights in float16, the schedule unchanged.

    Averages (`model_ema.*`) are left out.
    """
    weights = {name for name, _ in model.named_parameters()}
    return OrderedDict(
        (name, value.half() if name in weights else value.clone())
        for name, value in model.state_dict().items()
        if not name.startswith(EMA_PREFIX)
    )


def export(model: LatentDiffusion, ema: LitEma, step: int, path: Path) -> None:
    """Copies the averaged weights of `ema` into the U-Net and writes the checkpoint to `path`."""
    ema.copy_to(model.model)
    save_atomically({"state_dict": half_state(model), "global_step": step}, path)
