"""Makes a loaded model fast in place: the same layers under the same names, computed in fewer passes.

`accelerate` changes the classes of a model's layers to those of this module; their parameters keep the values of the
checkpoint's file. On a CPU each layer keeps a copy of its weights, cast and packed for the kernels, in addition to
parameters that cost no memory as long as they are views of a file. Results differ by rounding only.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.attention import (
    GEGLU,
    BasicTransformerBlock,
    CrossAttention,
    FeedForward,
    SpatialTransformer,
)
from ldm.modules.diffusionmodules import model as autoencoder
from ldm.modules.diffusionmodules import openaimodel as unet
from ldm.modules.diffusionmodules.controlnet import ControlNet
from ldm.places import cache_path
from ldm.runtime import kernels
from ldm.runtime.sharing import FastControlNet, FastUNet, repeated

Forget = Callable[[Tensor], object]
Made = TypeVar("Made")


@dataclass(frozen=True, slots=True)
class _Kept:
    """The packed form of a weight, and its size in bytes."""

    weight: Tensor
    version: int
    made: Any
    size: int


class Packer:
    """Casts and packs weights, once for each layer, within a `budget` in bytes (None: no limit).

    Weights that do not fit are packed at each use. `forget` is called with each weight that was read, so that a
    file's pages can leave memory.
    """

    def __init__(self, dtype: torch.dtype, forget: Forget, budget: int | None = None):
        self.dtype = dtype
        self._forget = forget
        self._budget = budget
        self._kept: dict[nn.Module, _Kept] = {}

    def get(self, user: nn.Module, weight: Tensor, make: Callable[[Tensor], Made]) -> Made:
        """Returns `make(weight)` for `user`, cached until the weight is another object or was changed in place."""
        version = 0 if weight.is_inference() else weight._version
        kept = self._kept.get(user)
        if kept is not None and kept.weight is weight and kept.version == version:
            return kept.made
        self._kept.pop(user, None)
        made = make(weight)
        self._forget(weight)
        size = weight.numel() * self.dtype.itemsize
        if self._budget is None or size + self.size <= self._budget:
            self._kept[user] = _Kept(weight, version, made, size)
        return made

    @property
    def size(self) -> int:
        """The bytes of the cached weights."""
        return sum(kept.size for kept in self._kept.values())

    def drop(self, module: nn.Module) -> None:
        """Frees the cached weights of the layers of `module`."""
        for layer in module.modules():
            self._kept.pop(layer, None)


class PackedConv2d(nn.Conv2d):
    """A convolution whose weight is packed when it first runs. Inputs of any dtype; output in the packer's."""

    packer: Packer

    def forward(self, input: Tensor, add: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        """Convolves; `add` has the output's shape, `shift` [1, out_channels] is equal for all samples and pixels."""
        stride, padding = self.stride, cast(tuple[int, ...], self.padding)
        packed = self.packer.get(
            self,
            self.weight,
            lambda weight: kernels.pack_convolution(weight, self.packer.dtype, stride, padding, input.shape),
        )
        bias = self.bias
        if shift is not None:
            bias = shift[0] if bias is None else bias + shift[0]
        return kernels.convolve(input, packed, bias, stride, padding, add)

    def doubled(self, x: Tensor, user: nn.Module) -> Tensor:
        """Convolves x at twice its size (nearest neighbour), without the large map. For 3x3 kernels."""
        packed = self.packer.get(
            user,
            self.weight,
            lambda weight: [
                kernels.pack_convolution(part, self.packer.dtype, (1, 1), (1, 1), x.shape)
                for part in kernels.parity_weights(weight)
            ],
        )
        return kernels.convolve_doubled(x, packed, self.bias)


class PackedLinear(nn.Linear):
    """A linear layer whose weight is packed when it first runs. Inputs of any dtype; output in the packer's."""

    packer: Packer

    def forward(self, input: Tensor, add: Tensor | None = None) -> Tensor:
        packed = self.packer.get(
            self, self.weight, lambda weight: kernels.pack_linear(weight, self.packer.dtype)
        )
        return kernels.multiply(input, packed, self.bias, add)


class WideEmbedding(nn.Embedding):
    """An embedding that returns float32, whatever its file holds."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).float()


class FusedGEGLU(GEGLU):
    """The gate's GELU and the product with the gate happen inside the two matrix products."""

    def forward(self, x: Tensor) -> Tensor:
        proj = cast(PackedLinear, self.proj)
        value, gate = proj.packer.get(
            self,
            proj.weight,
            lambda weight: [kernels.pack_linear(half, proj.packer.dtype) for half in weight.chunk(2)],
        )
        of_value, of_gate = proj.bias.chunk(2)
        return kernels.multiply(x, value, of_value, times=kernels.multiply(x, gate, of_gate, gelu=True))


class FastFeedForward(FeedForward):
    """The residual is added inside the last product."""

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        return self.net[2](self.net[0](x), add)


class FastCrossAttention(CrossAttention):
    """Computes keys and values of a context once; adds the residual inside the last product."""

    _context: tuple[Tensor, Tensor, Tensor] | None = None
    _keys_values: tuple[Tensor, Tensor] | None = None

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        add: Tensor | None = None,
    ) -> Tensor:
        if mask is not None:
            out = super().forward(x, context, mask)
            return out if add is None else out + add
        k, v = (self.to_k(x), self.to_v(x)) if context is None else self._of(context)
        return self.to_out[0](kernels.attend(self.to_q(x), k, v, self.heads), add)

    def _of(self, context: Tensor) -> tuple[Tensor, Tensor]:
        made_of = context, self.to_k.weight, self.to_v.weight
        last = self._context
        if (
            last is None
            or self._keys_values is None
            or any(a is not b for a, b in zip(last, made_of, strict=True))
        ):
            self._context, self._keys_values = made_of, (self.to_k(context), self.to_v(context))
        return self._keys_values


class FastTransformerBlock(BasicTransformerBlock):
    """Adds residuals inside products. If the context has twice x's samples, x is doubled after attn1."""

    def _forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        x = self.attn1(self.norm1(x), add=x)
        if context is not None:
            x = repeated(x, len(context))
        x = self.attn2(self.norm2(x), context=context, add=x)
        return self.ff(self.norm3(x), add=x)


class FastSpatialTransformer(SpatialTransformer):
    """Stays in channels-last memory; the residual is added inside the last product."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        height = x.shape[2]
        tokens = rearrange(self.proj_in(self.norm(x)), "b c h w -> b (h w) c")
        for block in self.transformer_blocks:
            tokens = block(tokens, context=context)
        maps = rearrange(tokens, "b (h w) c -> b c h w", h=height)
        return self.proj_out(maps, repeated(x, len(maps)))


class FastResBlock(unet.ResBlock):
    """Norm and SiLU in one buffer; time embedding and residual are added inside the convolutions, rounded once."""

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if self.use_scale_shift_norm:
            return super()._forward(x, emb)
        emb = self.emb_layers(emb)
        if len(emb) == 1:
            h = self.in_layers[2](_norm_silu(self.in_layers[0], x), shift=emb)
        else:
            h = self.in_layers[2](_norm_silu(self.in_layers[0], x)) + emb[:, :, None, None]
        return self.out_layers[3](_norm_silu(self.out_layers[0], h), self.skip_connection(x))


class FastUpsample(unet.Upsample):
    """Doubles the size within the convolution."""

    def forward(self, x: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        doubles = output_size is None or [2 * side for side in x.shape[2:]] == list(output_size)
        if doubles and isinstance(self.conv, PackedConv2d):
            return self.conv.doubled(x, self)
        return super().forward(x, output_size)


class FastResnetBlock(autoencoder.ResnetBlock):
    """Norm and SiLU in one buffer; the residual is added inside the convolution."""

    def forward(self, x: Tensor, temb: None = None) -> Tensor:
        h = self.conv1(_norm_silu(self.norm1, x))
        return self.conv2(_norm_silu(self.norm2, h), self.nin_shortcut(x))


class FastAttnBlock(autoencoder.AttnBlock):
    """Attention between pixels without leaving channels-last memory."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (rearrange(layer(h), "b c h w -> b (h w) c") for layer in (self.q, self.k, self.v))
        out = rearrange(kernels.attend(q, k, v, heads=1), "b (h w) c -> b c h w", h=x.shape[2])
        return self.proj_out(out, x)


class FastImageUpsample(autoencoder.Upsample):
    """Doubles the size within the convolution."""

    def forward(self, x: Tensor) -> Tensor:
        return self.conv.doubled(x, self) if isinstance(self.conv, PackedConv2d) else super().forward(x)


def _norm_silu(norm: nn.Module, x: Tensor) -> Tensor:
    return F.silu(norm(x), inplace=True)


_FAST: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: PackedConv2d,
    nn.Linear: PackedLinear,
    nn.Embedding: WideEmbedding,
    GEGLU: FusedGEGLU,
    FeedForward: FastFeedForward,
    CrossAttention: FastCrossAttention,
    BasicTransformerBlock: FastTransformerBlock,
    SpatialTransformer: FastSpatialTransformer,
    unet.ResBlock: FastResBlock,
    unet.Upsample: FastUpsample,
    unet.UNetModel: FastUNet,
    ControlNet: FastControlNet,
    autoencoder.ResnetBlock: FastResnetBlock,
    autoencoder.AttnBlock: FastAttnBlock,
    autoencoder.Upsample: FastImageUpsample,
}


def accelerate(network: nn.Module, packer: Packer) -> None:
    """Changes the layers of a network on the CPU to the fast ones. Subclasses from elsewhere are left unchanged.

    Such a subclass may call the blocks of its network as before: every block takes and returns the same values, in
    the packer's dtype. Parameters that are not packed become float32.
    """
    for layer in network.modules():
        fast = _FAST.get(type(layer))
        if isinstance(layer, nn.Conv2d) and not _packable(layer):
            fast = None
        if fast is not None:
            layer.__class__ = cast(Any, fast)
        if isinstance(layer, PackedConv2d | PackedLinear):
            layer.packer = packer
        for name, parameter in layer.named_parameters(recurse=False):
            if not (isinstance(layer, PackedConv2d | PackedLinear | WideEmbedding) and name == "weight"):
                parameter.data = parameter.data.float()


def prepare(
    model: LatentDiffusion,
    dtype: torch.dtype,
    forget: Forget,
    budget: int | None = None,
    compiled: bool = False,
) -> Packer | None:
    """Converts a loaded model's networks to `dtype`: packed copies on a CPU, else the parameters themselves.

    Parts that matter for precision more than for speed stay in float32, see `_parts`. Returns the holder of the
    packed weights; `forget` and `budget` are as in `Packer`. With `compiled` the U-Net is left to torch's compiler.
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
    packer = Packer(dtype, forget, budget)
    for parts, of_parts in ((fast, packer), (exact, Packer(torch.float32, forget))):
        for part in parts:
            accelerate(part, of_parts)
    return packer


def prepare_control(
    network: ControlNet, packer: Packer | None, device: torch.device, dtype: torch.dtype, forget: Forget
) -> None:
    """Converts a control network as `prepare` does its model: with the holder of that model's weights, or in place.

    Its hint, of which the features are computed once, is read in float32 where weights are packed.
    """
    if packer is None:
        network.to(device, dtype)
        return
    exact = Packer(torch.float32, forget)
    accelerate(network, packer)
    for part in (network.time_embed, network.input_hint_block):
        accelerate(part, exact)


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


def _packable(layer: nn.Conv2d) -> bool:
    plain = layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return plain and layer.groups == 1 and set(layer.dilation) == {1}
