"""Brings a loaded model to a precision: which parts of it run fast, and in which."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import cast

import torch
from torch import nn

from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.attention import BasicTransformerBlock
from ldm.modules.diffusionmodules import model as autoencoder
from ldm.modules.diffusionmodules import openaimodel as unet
from ldm.modules.diffusionmodules.controlnet import ControlNet
from ldm.places import cache_path
from ldm.runtime import int8 as int8_kernels
from ldm.runtime import kernels
from ldm.runtime.fast import accelerate
from ldm.runtime.packing import Forget, Kernels, PackedConv2d, PackedFiles, PackedLinear, Packer


def prepare(
    model: LatentDiffusion,
    dtype: torch.dtype,
    forget: Forget,
    budget: int | None = None,
    compiled: bool = False,
    int8: bool = False,
    files: PackedFiles | None = None,
) -> Packer | None:
    """Converts a loaded model's networks to `dtype`: packed copies on a CPU, else the parameters themselves.

    Parts that matter for precision more than for speed stay in float32, see `_parts`. Returns the holder of the
    packed weights; `forget`, `budget` and `files` are as in `Packer`. With `compiled` the U-Net is left to torch's
    compiler; with `int8` most layers of the U-Net compute with 8-bit numbers, see `rounded_layers`.
    """
    fast, exact = _parts(model)
    network = model.model.diffusion_model
    if compiled:
        _compile(network, dtype)
        done = {network, *network.children()}
        fast, exact = ([part for part in parts if part not in done] for parts in (fast, exact))
    if model.device.type != "cpu" or not kernels.can_pack(dtype):
        for part in fast:
            part.to(dtype)
        return None
    packer = Packer(dtype, forget, budget, files, model)
    for parts, of_parts in (
        (fast, packer),
        (exact, Packer(torch.float32, forget, files=files, model=model)),
    ):
        for part in parts:
            accelerate(part, of_parts)
    if int8:
        use_int8(rounded_layers(network))
    return packer


def prepare_control(
    network: ControlNet,
    packer: Packer | None,
    device: torch.device,
    dtype: torch.dtype,
    forget: Forget,
    int8: bool = False,
) -> None:
    """Converts a control network as `prepare` does its model: with the holder of that model's weights, or in place.

    Its hint, of which the features are computed once, is read in float32 where weights are packed.
    """
    if packer is None:
        network.to(device, dtype)
        return
    exact = Packer(torch.float32, forget)
    accelerate(network, packer)
    for part in _exact_parts(network):
        accelerate(part, exact)
    if int8:
        use_int8(rounded_layers(network))


def _exact_parts(network: ControlNet) -> list[nn.Module]:
    return [network.time_embed, network.input_hint_block]


def narrow_layers(network: ControlNet) -> list[nn.Conv2d | nn.Linear]:
    """Returns the layers of a control network whose weights `prepare_control` packs in half precision."""
    exact = {layer for part in _exact_parts(network) for layer in part.modules()}
    return [
        layer
        for layer in network.modules()
        if isinstance(layer, nn.Conv2d | nn.Linear) and layer not in exact
    ]


def use_int8(layers: Iterable[nn.Module]) -> None:
    """Makes layers that `accelerate` has changed multiply 8-bit numbers."""
    for layer in layers:
        if isinstance(layer, PackedConv2d | PackedLinear):
            layer.kernels = cast(Kernels, int8_kernels)


def rounded_layers(network: nn.Module) -> list[nn.Conv2d | nn.Linear]:
    """Returns the layers of a U-Net or a control network that `int8` rounds: nearly all of the work of a step.

    The first and the last convolution and the embedding of timesteps see what errors would harm most, keys and values
    of the text are computed once for a prompt; all of them cost nothing.
    """
    way_up = getattr(network, "output_blocks", ())
    blocks = [*network.input_blocks[1:], network.middle_block, *way_up]  # type: ignore
    layers: list[nn.Module] = [layer for block in cast(list[nn.Module], blocks) for layer in block.modules()]
    kept: set[nn.Module] = set()
    for layer in layers:
        if isinstance(layer, unet.ResBlock):
            kept |= set(layer.emb_layers)
        elif isinstance(layer, BasicTransformerBlock):
            kept |= {layer.attn2.to_k, layer.attn2.to_v}
    return [layer for layer in layers if isinstance(layer, nn.Conv2d | nn.Linear) and layer not in kept]


def rounded_keys(model: LatentDiffusion) -> set[str]:
    """Returns the keys of the weights that `prepare` with `int8` only ever uses rounded to 8 bits."""
    weights = {id(layer.weight) for layer in rounded_layers(model.model.diffusion_model)}
    return {key for key, weight in model.named_parameters() if id(weight) in weights} & halved(model)


def _compile(network: nn.Module, dtype: torch.dtype) -> None:
    """Converts parameters to half precision and channels last; the code is compiled at its first call and cached."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_path("compiled")))
    network.to(dtype=dtype).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    network.compile(options={"freezing": True})


def halved(model: LatentDiffusion) -> set[str]:
    """Returns the keys of the weights that `prepare` only ever uses rounded to its `dtype`, on a CPU."""
    fast, exact = _parts(model)
    doubling = (unet.Upsample, autoencoder.Upsample)
    wide = {id(layer) for part in exact for layer in part.modules()}
    for part in fast:
        wide |= {
            id(layer.conv) for layer in part.modules() if isinstance(layer, doubling)
        }  # summed in float32
    rounded = {
        id(layer.weight)
        for part in fast
        for layer in part.modules()
        if isinstance(layer, nn.Conv2d | nn.Linear) and id(layer) not in wide
    }
    return {key for key, parameter in model.named_parameters() if id(parameter) in rounded}


def _parts(model: LatentDiffusion) -> tuple[list[nn.Module], list[nn.Module]]:
    """Returns the parts that run in the precision of the run, and those of them that run in float32 regardless.

    The autoencoder's encoder does as in the original; the embedding of timesteps and the last layer cost nothing, and
    guidance would amplify the rounding of the last.
    """
    vae, network = model.first_stage_model, model.model.diffusion_model
    fast = [network, model.cond_stage_model, vae.decoder, vae.post_quant_conv]
    guided = [network.time_embedding] if hasattr(network, "time_embedding") else []
    return fast, [network.time_embed, *guided, network.out, vae.encoder, vae.quant_conv]
