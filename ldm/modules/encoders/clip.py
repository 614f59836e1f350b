"""CLIP's text and vision towers, with the parameter names of published checkpoints (Radford et al. 2021)."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F


def _position_ids(count: int) -> Tensor:
    """[[0, 1, ...]]: a computed value, so it is never left on the meta device that a model may be built on."""
    return torch.arange(count, device="cpu")[None]


class CLIPEmbeddings(nn.Module):
    """Token plus position embeddings: ids [B, L] -> [B, L, width], L at most `positions`.

    Ids from `tokens` upward mean the rows of `added` [n, width], which is no part of the state dict.
    """

    position_ids: Tensor
    added: Tensor | None

    def __init__(self, tokens: int, positions: int, width: int):
        super().__init__()
        self.token_embedding = nn.Embedding(tokens, width)
        self.position_embedding = nn.Embedding(positions, width)
        self.register_buffer("position_ids", _position_ids(positions))
        self.register_buffer("added", None, persistent=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self._tokens(input_ids) + self.position_embedding.weight[: input_ids.shape[1]]

    def _tokens(self, input_ids: Tensor) -> Tensor:
        if self.added is None:
            return self.token_embedding(input_ids)
        beyond = input_ids - self.token_embedding.num_embeddings
        known = self.token_embedding(input_ids.where(beyond < 0, 0))
        return known.where(beyond[..., None] < 0, F.embedding(beyond.clamp(min=0), self.added).to(known))


class CLIPVisionEmbeddings(nn.Module):
    """A class token and one token per patch, plus positions: [N, 3, side, side] -> [N, 1 + patches, width]."""

    position_ids: Tensor

    def __init__(self, side: int, patch: int, width: int):
        super().__init__()
        positions = 1 + (side // patch) ** 2
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.patch_embedding = nn.Conv2d(3, width, kernel_size=patch, stride=patch, bias=False)
        self.position_embedding = nn.Embedding(positions, width)
        self.register_buffer("position_ids", _position_ids(positions))

    def forward(self, pictures: Tensor) -> Tensor:
        patches = rearrange(self.patch_embedding(pictures), "n c h w -> n (h w) c")
        start = self.class_embedding.expand(len(patches), 1, -1)
        return torch.cat([start, patches], dim=1) + self.position_embedding.weight


class CLIPAttention(nn.Module):
    """Multi-head self-attention; if `causal`, a token sees itself and those before it, else all."""

    def __init__(self, width: int, heads: int, causal: bool = True):
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            rearrange(y, "b n (h d) -> b h n d", h=self.heads)
            for y in (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        )
        out = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out_proj(rearrange(out, "b h n d -> b n (h d)"))


class CLIPMLP(nn.Module):
    """Two linear layers with CLIP's quick GELU, x * sigmoid(1.702 x), between them."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x)
        return self.fc2(h * torch.sigmoid(1.702 * h))


class CLIPEncoderLayer(nn.Module):
    """Attention and feed-forward, each behind a layer norm and a residual."""

    def __init__(self, width: int, heads: int, inner: int, causal: bool = True):
        super().__init__()
        self.self_attn = CLIPAttention(width, heads, causal)
        self.layer_norm1 = nn.LayerNorm(width)
        self.mlp = CLIPMLP(width, inner)
        self.layer_norm2 = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class CLIPEncoder(nn.Module):
    """The stack of layers."""

    def __init__(self, width: int, layers: int, heads: int, inner: int, causal: bool = True):
        super().__init__()
        self.layers = nn.ModuleList(CLIPEncoderLayer(width, heads, inner, causal) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class CLIPTextTransformer(nn.Module):
    """Ids [B, L] -> hidden states [B, L, width] of the last layer, after the final layer norm."""

    def __init__(self, tokens: int, positions: int, width: int, layers: int, heads: int, inner: int):
        super().__init__()
        self.embeddings = CLIPEmbeddings(tokens, positions, width)
        self.encoder = CLIPEncoder(width, layers, heads, inner)
        self.final_layer_norm = nn.LayerNorm(width)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.final_layer_norm(self.encoder(self.embeddings(input_ids)))


class CLIPTextModel(nn.Module):
    """The text tower under the name `text_model`, the level that published checkpoints have."""

    def __init__(
        self,
        tokens: int = 49408,
        positions: int = 77,
        width: int = 768,
        layers: int = 12,
        heads: int = 12,
        inner: int | None = None,
    ):
        super().__init__()
        self.text_model = CLIPTextTransformer(tokens, positions, width, layers, heads, inner or 4 * width)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Ids [B, L] -> hidden states [B, L, width]."""
        return self.text_model(input_ids)


class CLIPVisionTransformer(nn.Module):
    """Pictures [N, 3, side, side] -> the class token of the last layer [N, width], after the final layer norm."""

    def __init__(self, side: int, patch: int, width: int, layers: int, heads: int, inner: int):
        super().__init__()
        self.embeddings = CLIPVisionEmbeddings(side, patch, width)
        self.pre_layrnorm = nn.LayerNorm(width)  # the spelling of published checkpoints
        self.encoder = CLIPEncoder(width, layers, heads, inner, causal=False)
        self.post_layernorm = nn.LayerNorm(width)

    def forward(self, pictures: Tensor) -> Tensor:
        tokens = self.encoder(self.pre_layrnorm(self.embeddings(pictures)))
        return self.post_layernorm(tokens[:, 0])


class CLIPVisionModel(nn.Module):
    """The vision tower under the name `vision_model`, the level that published checkpoints have."""

    def __init__(self, side: int, patch: int, width: int, layers: int, heads: int, inner: int):
        super().__init__()
        self.vision_model = CLIPVisionTransformer(side, patch, width, layers, heads, inner)

    def forward(self, pictures: Tensor) -> Tensor:
        """Normalised pictures [N, 3, side, side] -> pooled states [N, width]."""
        return self.vision_model(pictures)
