"""IP-Adapter files: recognised by content, and made into a network for a loaded U-Net."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from ldm.checkpoints.formats.detect import CheckpointError
from ldm.checkpoints.formats.read import Checkpoint
from ldm.checkpoints.load import load_into, skip_init
from ldm.modules.attention import cross_attentions
from ldm.modules.diffusionmodules.image_prompt import ImageTokens, IPAdapter, Resampler
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.util import printable

_LAYER = re.compile(r"ip_adapter\.(\d{1,3})\.to_k_ip\.weight")
_FAMILIES = {2048: "SDXL", 1024: "Stable Diffusion v2", 4096: "Kolors or Stable Diffusion 3"}
# keys of kinds that see a face by other networks than the image encoder alone
_OTHERS = (
    ("FaceID Plus", "image_proj.perceiver_resampler.proj_in.weight"),
    ("FaceID", "image_proj.proj.2.weight"),
)


def check_ip(weights: Mapping[str, Tensor]) -> None:
    """Raises `CheckpointError` for an IP-Adapter of another kind or for another model than v1."""
    context = {tensor.shape[-1] for key, tensor in weights.items() if _LAYER.fullmatch(key)}
    for width in context & _FAMILIES.keys():
        raise CheckpointError(
            f"is an IP-Adapter for {_FAMILIES[width]}, and this toolkit runs Stable Diffusion v1"
        )
    lora = any(".to_k_lora." in key for key in weights)
    for name, key in _OTHERS:
        if key in weights and ("image_proj.proj.3.weight" not in weights or lora):
            raise CheckpointError(
                f"is an IP-Adapter {name}, which reads faces by InsightFace's network, that is not here; for a face "
                "give ip-adapter-plus-face_sd15.safetensors, which reads the image itself"
            )
    if not context or not {"image_proj.proj.weight", "image_proj.latents"} & weights.keys():
        raise CheckpointError("is an IP-Adapter of an unknown kind; give a plain or a plus one for v1")


def image_width(weights: Mapping[str, Tensor]) -> tuple[bool, int]:
    """Whether an IP-Adapter of these weights reads states instead of an embedding, and of how many numbers.

    0 in a file that is not whole.
    """
    states = "image_proj.latents" in weights
    key = "image_proj.proj_in.weight" if states else "image_proj.proj.weight"
    return states, weights[key].shape[-1] if key in weights else 0


def ip_network(checkpoint: Checkpoint, unet: UNetModel) -> IPAdapter:
    """The network of an IP-Adapter's weights for a U-Net; `CheckpointError` where the shapes disagree."""
    weights = checkpoint.state_dict
    found = {
        int(match[1]): (tensor.shape[-1], tensor.shape[0])
        for key, tensor in weights.items()
        if (match := _LAYER.fullmatch(key)) and tensor.dim() == 2
    }
    theirs = [found[number][::-1] for number in sorted(found)]
    ours = [(layer.to_k.out_features, layer.to_k.in_features) for layer in cross_attentions(unet)]
    if theirs != ours:
        raise CheckpointError(
            f"{printable(checkpoint.path)}: is an IP-Adapter for {len(theirs)} layers of attention, of other sizes "
            f"than the model's {len(ours)}; give one that was trained for this model"
        )
    with skip_init():
        network = IPAdapter(_projection(checkpoint.path, weights), {n: found[n] for n in sorted(found)})
    load_into(network, checkpoint, logs=False)
    return network.eval()


def _projection(path: Path, weights: Mapping[str, Tensor]) -> nn.Module:
    shapes = {key.removeprefix("image_proj."): tensor.shape for key, tensor in weights.items()}
    try:
        if "latents" not in shapes:
            (context,), (wide, width) = shapes["norm.weight"], shapes["proj.weight"]
            return ImageTokens(width, context, wide // context)
        (_, tokens, inner), (context, _) = shapes["latents"], shapes["proj_out.weight"]
        depth = sum(key.endswith(".0.to_q.weight") for key in shapes)
        query, hidden = shapes["layers.0.0.to_q.weight"][0], shapes["layers.0.1.1.weight"][0]
        return Resampler(shapes["proj_in.weight"][1], context, tokens, inner, query, hidden, depth)
    except (KeyError, ValueError):
        raise CheckpointError(
            f"{printable(path)}: is an IP-Adapter whose image_proj is incomplete; get the whole file"
        ) from None
