"""IP-Adapter: images as prompts, by keys and values next to those of the text (Ye et al. 2023, arXiv 2308.06721)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

_HEAD = 64  # channels of a head of the resampler


class ImageTokens(nn.Module):
    """The plain adapter's projection: an image's embedding [N, width] to tokens [N, tokens, context_width]."""

    def __init__(self, width: int, context_width: int, tokens: int):
        super().__init__()
        self.tokens = tokens
        self.proj = nn.Linear(width, tokens * context_width)
        self.norm = nn.LayerNorm(context_width)

    def forward(self, embedding: Tensor) -> Tensor:
        return self.norm(self.proj(embedding).unflatten(1, (self.tokens, -1)))


class ResamplerAttention(nn.Module):
    """Attention from the queries to an image's states and to themselves."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.heads = inner // _HEAD
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)

    def forward(self, states: Tensor, queries: Tensor) -> Tensor:
        states, queries = self.norm1(states), self.norm2(queries)
        k, v = self.to_kv(torch.cat([states, queries], dim=1)).chunk(2, dim=-1)
        q, k, v = (rearrange(y, "b n (h d) -> b h n d", h=self.heads) for y in (self.to_q(queries), k, v))
        out = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(rearrange(out, "b h n d -> b n (h d)"))


class Resampler(nn.Module):
    """The plus adapter's projection: all states of an image [N, M, width] to tokens [N, tokens, context_width]."""

    def __init__(
        self, width: int, context_width: int, tokens: int, inner: int, query: int, hidden: int, depth: int
    ):
        super().__init__()
        self.latents = nn.Parameter(torch.empty(1, tokens, inner))
        self.proj_in, self.proj_out = nn.Linear(width, inner), nn.Linear(inner, context_width)
        self.norm_out = nn.LayerNorm(context_width)
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    ResamplerAttention(inner, query),
                    nn.Sequential(
                        nn.LayerNorm(inner),
                        nn.Linear(inner, hidden, bias=False),
                        nn.GELU(),
                        nn.Linear(hidden, inner, bias=False),
                    ),
                ]
            )
            for _ in range(depth)
        )

    def forward(self, states: Tensor) -> Tensor:
        states, queries = self.proj_in(states), self.latents.expand(len(states), -1, -1)
        for layer in self.layers:
            attend, feed = cast("Sequence[nn.Module]", layer)
            queries = queries + attend(states, queries)
            queries = queries + feed(queries)
        return self.norm_out(self.proj_out(queries))


class KeysValues(nn.Module):
    """Keys and values that one cross-attention layer of the U-Net has for image tokens."""

    def __init__(self, context_width: int, width: int):
        super().__init__()
        self.to_k_ip = nn.Linear(context_width, width, bias=False)
        self.to_v_ip = nn.Linear(context_width, width, bias=False)


class IPAdapter(nn.Module):
    """Tokens of an image, and their keys and values for each cross-attention layer; named as in the authors' files.

    `layers` are the widths of the context and of each layer, by its number in a file: odd, down, up, then the middle.
    """

    def __init__(self, image_proj: nn.Module, layers: Mapping[int, tuple[int, int]]):
        super().__init__()
        self.image_proj = image_proj
        self.ip_adapter = nn.ModuleDict({str(number): KeysValues(*sizes) for number, sizes in layers.items()})

    @property
    def width(self) -> int:
        """How many numbers it reads of an image, or of each state of one."""
        first: Any = self.image_proj.proj_in if self.reads_states else self.image_proj.proj
        return first.in_features

    @property
    def reads_states(self) -> bool:
        """Whether it reads all states of the image encoder's last layer but one, and not the image's embedding."""
        return isinstance(self.image_proj, Resampler)

    def forward(self, seen: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values [N, tokens, width] of each layer, of embeddings or states of N images."""
        tokens = self.image_proj(seen)
        layers: Any = self.ip_adapter.values()
        return [(layer.to_k_ip(tokens), layer.to_v_ip(tokens)) for layer in layers]
