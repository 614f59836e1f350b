"""Makes a loaded model fast in place: the same layers under the same names, computed in fewer passes.

`accelerate` changes the classes of a model's layers to those of this module; their parameters keep the values of the
checkpoint's file. On a CPU each layer keeps a copy of its weights, cast and packed for the kernels, in addition to
parameters that cost no memory as long as they are views of a file. Results differ by rounding only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

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
from ldm.runtime import kernels, native
from ldm.runtime.allocator import return_freed
from ldm.runtime.packing import PackedConv2d, PackedLinear, Packer, WideEmbedding
from ldm.runtime.sharing import FastControlNet, FastUNet, repeated

_LARGE_MAP = 2**21  # values; giving back memory takes 1 to 3 ms


class FusedGEGLU(GEGLU):
    """The gate's GELU and the product with the gate happen inside the two matrix products."""

    def forward(self, x: Tensor) -> Tensor:
        proj = cast(PackedLinear, self.proj)
        value, gate = proj.packer.get(
            self,
            proj.weight,
            lambda weight: [proj.kernels.pack_linear(half, proj.packer.dtype) for half in weight.chunk(2)],
        )
        of_value, of_gate = proj.bias.chunk(2)
        x, multiply = proj.as_input(x), proj.kernels.multiply
        return multiply(x, value, of_value, times=multiply(x, gate, of_gate, gelu=True))


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
        if context is None:
            x = _shared(x, self.to_q, self.to_k, self.to_v)
        k, v = (self.to_k(x), self.to_v(x)) if context is None else self._of(context)
        q = self.to_q(x)
        out = kernels.attend(q, k, v, self.heads)
        for keys, values, weight in self.images:
            out = out + weight * kernels.attend(q, keys, values, self.heads)
        return self.to_out[0](out, add)

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
        first, second = self.in_layers[2], self.out_layers[3]
        h = _norm_silu(self.in_layers[0], x, first)
        h = first(h, shift=emb) if len(emb) == 1 else first(h) + emb[:, :, None, None]
        h = _norm_silu(self.out_layers[0], h, second)  # the map before it is freed now
        return second(h, add=self.skip_connection(x))


class FastGroupNorm(nn.GroupNorm):
    """Normalises maps of bf16 in channels-last memory in two passes, of which the second computes a SiLU too."""

    computes_silu = True

    def forward(self, input: Tensor, silu: bool = False) -> Tensor:
        if input.dim() == 4:
            x = input.permute(0, 2, 3, 1)
            if native.can_normalise(x, self.weight, self.bias):
                out = native.group_norm(x, self.num_groups, self.weight, self.bias, self.eps, silu)
                return out.permute(0, 3, 1, 2)
        out = super().forward(input)
        return F.silu(out, inplace=True) if silu else out


class FastLayerNorm(nn.LayerNorm):
    """Normalises tokens of bf16 in one pass."""

    def forward(self, input: Tensor) -> Tensor:
        if len(self.normalized_shape) == 1 and native.can_normalise(input, self.weight, self.bias):
            return native.layer_norm(input, self.weight, self.bias, self.eps)
        return super().forward(input)


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
        h = self.conv1(_norm_silu(self.norm1, x, self.conv1))
        h = _norm_silu(self.norm2, h, self.conv2)  # the map before it is freed now: in a decoder it is large
        return cast(PackedConv2d, self.conv2)(h, add=self.nin_shortcut(x))


class FastAttnBlock(autoencoder.AttnBlock):
    """Attention between pixels without leaving channels-last memory."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (rearrange(layer(h), "b c h w -> b (h w) c") for layer in (self.q, self.k, self.v))
        out = rearrange(kernels.attend(q, k, v, heads=1), "b (h w) c -> b c h w", h=x.shape[2])
        return self.proj_out(out, x)


class FastImageUpsample(autoencoder.Upsample):
    """Doubles the size within the convolution; what the small maps before needed is given back for the large ones."""

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() >= _LARGE_MAP:
            return_freed()
        return self.conv.doubled(x, self) if isinstance(self.conv, PackedConv2d) else super().forward(x)


def _norm_silu(norm: nn.Module, x: Tensor, convolution: nn.Module) -> Any:
    """Returns the SiLU of the normalised x, in the form that the convolution computes with."""
    return cast(PackedConv2d, convolution).kernels.norm_silu(norm, x)


def _shared(x: Tensor, *layers: nn.Module) -> Any:
    """Returns x in the form that these layers compute with, made once; x itself if they differ in it."""
    forms = {layer.kernels if isinstance(layer, PackedLinear) else None for layer in layers}
    return cast(PackedLinear, layers[0]).as_input(x) if len(forms) == 1 and None not in forms else x


_FAST: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: PackedConv2d,
    nn.Linear: PackedLinear,
    nn.Embedding: WideEmbedding,
    nn.GroupNorm: FastGroupNorm,
    nn.LayerNorm: FastLayerNorm,
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


def _packable(layer: nn.Conv2d) -> bool:
    plain = layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return plain and layer.groups == 1 and set(layer.dilation) == {1}
