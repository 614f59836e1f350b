"""`ldm convert` with --extract_lora or --resize_lora: writes a LoRA that is computed."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from ldm.checkpoints.adapters.lora import read_lora
from ldm.checkpoints.adapters.lora_factors import extracted, resized
from ldm.checkpoints.adapters.lora_files import lora_file
from ldm.checkpoints.adapters.lora_names import layers_by_name
from ldm.checkpoints.convert import naming
from ldm.checkpoints.formats.write import write_safetensors
from ldm.config import read_config
from ldm.files import written_whole
from ldm.pipeline.load import load_model
from ldm.places import find
from ldm.runs.models import choose_model
from ldm.runs.options import RunOptions
from ldm.util import need, printable


def write_computed_lora(opt: argparse.Namespace) -> None:
    """Writes the LoRA that the options ask for to `opt.out`, in float16 unless --dtype is another."""
    out = Path(opt.out)
    need(out.suffix == ".safetensors", f"{printable(out)}: a LoRA is written as safetensors; name it so")
    need(
        not out.exists(), f"{printable(out)} exists already, and nothing is overwritten; choose another name"
    )
    chosen = RunOptions(
        outdir="", ckpt=opt.extract_lora, config=opt.config, allow_targets=tuple(opt.allow_targets)
    )
    config_path, ckpt = choose_model(chosen)
    config = read_config(config_path, opt.allow_targets)
    base = load_model(config, ckpt)
    if opt.extract_lora:
        tuned = load_model(config, find(opt.ckpt)).state_dict()
        tensors = dict(extracted(tuned, base, opt.rank, opt.conv_rank))
    else:
        lora = read_lora(lora_file(find(opt.ckpt)), layers_by_name(base), base)
        tensors = dict(resized(lora.layers, base, opt.rank))
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(opt.dtype, torch.float16)
    types = {key: torch.float32 if key.endswith(".alpha") else dtype for key in tensors}
    notes = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(opt.rank),
        "ss_network_alpha": str(float(opt.rank)),
        "ss_output_name": out.stem,
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.title": out.stem,
    }
    with naming(out), written_whole(out) as part:
        write_safetensors(part, tensors, types, notes)
