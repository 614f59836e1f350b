"""Attention over pixels and text: the transformer blocks inside the U-Net."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.modules.diffusionmodules.util import checkpoint as run_checkpointed
from ldm.modules.diffusionmodules.util import zero_module
from ldm.util import default as default
from ldm.util import exists as exists
from ldm.util import only_with


class GEGLU(nn.Module):
    """A linear layer whose output is gated by the GELU of a second one (Shazeer 2020, "GLU Variants")."""

    def __init__(self, dim_in: int, dim_out: int):
        super().__init__()
        self.proj = nn.Linear(dim_in, dim_out * 2)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """Two linear layers with a (gated) GELU between them: [..., dim] -> [..., dim_out]."""

    def __init__(
        self, dim: int, dim_out: int | None = None, mult: int = 4, glu: bool = False, dropout: float = 0.0
    ):
        super().__init__()
        inner = dim * mult
        enter = GEGLU(dim, inner) if glu else nn.Sequential(nn.Linear(dim, inner), nn.GELU())
        self.net = nn.Sequential(enter, nn.Dropout(dropout), nn.Linear(inner, dim_out or dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class ImagePrompt(NamedTuple):
    """Keys and values [B, M, inner] of an image in one layer of cross-attention, and the weight of what they give."""

    keys: Tensor
    values: Tensor
    weight: float


class CrossAttention(nn.Module):
    """Multi-head attention from x [B, N, query_dim] to context [B, M, context_dim], or to x itself.

    What x finds in `images` is added to what it finds in the context (Ye et al. 2023, IP-Adapter, equation 5).
    """

    images: Sequence[ImagePrompt] = ()

    def __init__(
        self,
        query_dim: int,
        context_dim: int | None = None,
        heads: int = 8,
        dim_head: int = 64,
        dropout: float = 0.0,
    ):
        super().__init__()
        inner = heads * dim_head
        self.heads = heads
        self.scale = dim_head**-0.5
        self.to_q = nn.Linear(query_dim, inner, bias=False)
        context_dim = query_dim if context_dim is None else context_dim
        self.to_k = nn.Linear(context_dim, inner, bias=False)
        self.to_v = nn.Linear(context_dim, inner, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, query_dim), nn.Dropout(dropout))

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """`mask` [B, M] is True where x may attend to the context."""
        context = x if context is None else context
        q, k, v = map(self._by_head, (self.to_q(x), self.to_k(context), self.to_v(context)))
        if mask is not None:
            mask = rearrange(mask.bool(), "b ... -> b 1 1 (...)")
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)
        for keys, values, weight in self.images:
            k, v = self._by_head(keys), self._by_head(values)
            out = out + weight * F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return self.to_out(rearrange(out, "b h n d -> b n (h d)"))

    def _by_head(self, x: Tensor) -> Tensor:
        return rearrange(x, "b n (h d) -> b h n d", h=self.heads)


def cross_attentions(unet: Any) -> list[CrossAttention]:
    """The layers of a U-Net that attend to its context: those of the way down, of the way up, of the middle."""
    parts = unet.input_blocks, unet.output_blocks, unet.middle_block
    return [
        layer.attn2 for part in parts for layer in part.modules() if isinstance(layer, BasicTransformerBlock)
    ]


@contextmanager
def seeing(unet: Any, images: Sequence[Sequence[ImagePrompt]]) -> Generator[None]:
    """Has each layer of `cross_attentions` attend to images as well."""
    layers = cross_attentions(unet)
    for layer, of_layer in zip(layers, images, strict=True):
        layer.images = of_layer
    try:
        yield
    finally:
        for layer in layers:
            del layer.images  # those of the class again: none


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward, each after a layer norm and with a residual."""

    def __init__(
        self,
        dim: int,
        n_heads: int,
        d_head: int,
        dropout: float = 0.0,
        context_dim: int | None = None,
        gated_ff: bool = True,
        checkpoint: bool = True,
        disable_self_attn: bool = False,
    ):
        super().__init__()
        only_with("BasicTransformerBlock", disable_self_attn=(disable_self_attn, False))
        self.disable_self_attn = disable_self_attn
        self.attn1 = CrossAttention(dim, heads=n_heads, dim_head=d_head, dropout=dropout)
        self.ff = FeedForward(dim, dropout=dropout, glu=gated_ff)
        self.attn2 = CrossAttention(dim, context_dim, heads=n_heads, dim_head=d_head, dropout=dropout)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)
        self.checkpoint = checkpoint

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return run_checkpointed(self._forward, (x, context), self.parameters(), self.checkpoint)

    def _forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        x = self.attn1(self.norm1(x)) + x
        x = self.attn2(self.norm2(x), context=context) + x
        return self.ff(self.norm3(x)) + x


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of an image: [B, C, H, W] -> [B, C, H, W], residual.

    The cross-attention attends to `context` [B, M, context_dim]; without it that, too, is self-attention.
    `disable_self_attn` and `use_linear` are keywords of later versions of the original, off in all v1 models.
    """

    def __init__(
        self,
        in_channels: int,
        n_heads: int,
        d_head: int,
        depth: int = 1,
        dropout: float = 0.0,
        context_dim: int | None = None,
        disable_self_attn: bool = False,
        use_linear: bool = False,
        use_checkpoint: bool = True,
        num_groups: int = 32,
    ):
        super().__init__()
        only_with(
            "SpatialTransformer", disable_self_attn=(disable_self_attn, False), use_linear=(use_linear, False)
        )
        inner = n_heads * d_head
        self.in_channels, self.use_linear = in_channels, use_linear
        self.norm = nn.GroupNorm(num_groups, in_channels, eps=1e-6)
        self.proj_in = nn.Conv2d(in_channels, inner, 1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(inner, n_heads, d_head, dropout, context_dim, checkpoint=use_checkpoint)
            for _ in range(depth)
        )
        self.proj_out = zero_module(nn.Conv2d(inner, in_channels, 1))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        height, width = x.shape[-2:]
        tokens = rearrange(self.proj_in(self.norm(x)), "b c h w -> b (h w) c")
        for block in self.transformer_blocks:
            tokens = block(tokens, context=context)
        return self.proj_out(rearrange(tokens, "b (h w) c -> b c h w", h=height, w=width)) + x


def pixel_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Computes single-head attention between the pixels of [B, C, H, W] maps."""
    height = q.shape[2]
    q, k, v = (rearrange(y, "b c h w -> b (h w) c") for y in (q, k, v))
    # the CPU's fused kernel needs contiguous tensors with an axis of heads; any other path keeps all scores at once
    q, k, v = (y.contiguous()[:, None] for y in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v)[:, 0]
    return rearrange(out, "b (h w) c -> b c h w", h=height)
