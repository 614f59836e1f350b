"""Writes a trained LoRA as a safetensors file, in kohya's names or in those of diffusers."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ldm.checkpoints.adapters.lora_names import written_names
from ldm.checkpoints.formats.write import data_order, write_safetensors
from ldm.files import written_whole
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.training.lora import LoraLayers

LAYOUTS = ("kohya", "diffusers")


def lora_tensors(
    lora: LoraLayers, model: LatentDiffusion, layout: str, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Returns the tensors of a file in `layout`; alphas are float32, the rest `dtype`.

    In diffusers' names there is no alpha, so it is part of the upward factor.
    """
    names = written_names(model, layout)
    tensors: dict[str, Tensor] = {}
    for path, layer in lora.paths.items():
        kernel = [1] * (layer.down.dim() - 2)
        down, up = layer.down.detach(), layer.up.detach().reshape(*layer.up.shape, *kernel)
        name = names[path]
        if layout == "kohya":
            tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
            tensors[f"{name}.alpha"] = torch.tensor(layer.alpha)
            if layer.magnitude is not None:
                tensors[f"{name}.dora_scale"] = layer.magnitude.detach().reshape(-1, 1, *kernel)
        else:
            tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up * layer.scale}
            if layer.magnitude is not None:
                tensors[f"{name}.lora_magnitude_vector"] = layer.magnitude.detach()
    return {
        key: value.cpu() if key.endswith(".alpha") else value.to("cpu", dtype)
        for key, value in tensors.items()
    }


def write_lora(
    path: Path, tensors: Mapping[str, Tensor], notes: Mapping[str, str], overwrite: bool = False
) -> None:
    """Writes the file whole or not at all; `notes` become its metadata, with kohya's hash of the tensors' bytes."""
    metadata = {**notes, "sshs_model_hash": tensors_sha256(tensors)}
    with written_whole(path, overwrite=overwrite) as part:
        write_safetensors(part, tensors, None, metadata)


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Returns the SHA-256 of the tensors' bytes in the order in which a safetensors file holds them."""
    digest = hashlib.sha256()
    for key in data_order(tensors, {name: tensor.dtype for name, tensor in tensors.items()}):
        digest.update(tensors[key].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
