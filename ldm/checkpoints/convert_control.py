"""Writes a ControlNet in another layout or precision, as a whole or not at all, and never over another file."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from ldm.checkpoints.adapters.control import ControlFile, control_network
from ldm.checkpoints.convert import Layout, check_output, folder_written_whole, naming
from ldm.checkpoints.diffusers_folder import class_entries, write_json
from ldm.checkpoints.formats.write import types_for, write_safetensors, write_torch
from ldm.checkpoints.layouts.control_names import PREFIX, diffusers_weights
from ldm.checkpoints.layouts.settings import control_config
from ldm.files import without_leftovers, written_whole
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.util import need


def convert_control(
    file: ControlFile,
    unet: UNetModel,
    out: str | os.PathLike[str],
    to: Layout,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes a ControlNet for models of this U-Net: its weights are checked as for a run.

    "compvis" is one safetensors file under the authors' names, "ckpt" the same as torch saves it, both with the
    prefix that the authors' files have; "diffusers" a folder for `ControlNetModel.from_pretrained`. `dtype` None
    keeps each weight's type. Raises `InputError`, and `OSError`, which names `out`.
    """
    check_output(out, to, "auto")
    need(
        not file.is_difference,
        "a ControlNet of differences needs its model's weights, and cannot be converted",
    )
    network = control_network(file, unet)
    weights = dict(network.state_dict())
    if to == "diffusers":
        named = diffusers_weights(weights)
        config = control_config(unet, network.hint_channels, file.pools)
        with naming(out), without_leftovers(Path(out)), folder_written_whole(Path(out)) as folder:
            write_json(folder / "config.json", {**class_entries("ControlNetModel"), **config})
            with written_whole(folder / "diffusion_pytorch_model.safetensors") as part:
                write_safetensors(part, named, types_for(named, dtype), {"format": "pt"})
        return
    named = {PREFIX + name: tensor for name, tensor in weights.items()}
    types = types_for(named, dtype)
    with naming(out), without_leftovers(Path(out)), written_whole(Path(out)) as part:
        if to == "ckpt":
            write_torch(part, {"state_dict": {k: v.to(types[k]).contiguous() for k, v in named.items()}})
        else:
            write_safetensors(part, named, types, {"format": "pt"})
