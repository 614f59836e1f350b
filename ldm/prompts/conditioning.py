"""Encodes weighted and long prompts as the context of the U-Net's cross-attention."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ldm.modules.encoders.modules import FrozenCLIPEmbedder
from ldm.prompts.weights import Chunk, chunk_prompt
from ldm.util import InputError


def count_chunks(embedder: nn.Module, prompts: Sequence[str]) -> int:
    """Returns how many chunks of 75 tokens the longest prompt has; see `chunk_prompt` for the errors."""
    return max(map(len, _chunked(embedder, prompts)))


def encode_weighted(
    embedder: nn.Module, prompts: Sequence[str], chunks: int = 1, clip_skip: int = 1
) -> Tensor:
    """Encodes prompts in A1111's syntax as [N, 77 * C, width]; C is `chunks`, by default that of the longest prompt.

    Each chunk is encoded separately, so that the result does not depend on the other prompts;
    shorter prompts are padded with chunks of the empty one. A prompt of one chunk without weights gives the output
    of `embedder.encode`, bit for bit; `clip_skip` is as there. `InputError` for a text encoder other than CLIP's.
    """
    rows = _chunked(embedder, prompts)
    count = max(chunks, *map(len, rows))
    (empty,) = _chunked(embedder, [""])
    encoded: dict[Chunk, Tensor] = {}
    for row in rows:
        row += empty * (count - len(row))
        encoded |= {chunk: _encode(embedder, chunk, clip_skip) for chunk in row if chunk not in encoded}
    return torch.cat([torch.cat([encoded[chunk] for chunk in row], dim=1) for row in rows])


def _clip(embedder: nn.Module) -> FrozenCLIPEmbedder:
    if not isinstance(embedder, FrozenCLIPEmbedder):
        raise InputError("prompt weights need a CLIP text encoder, which this model has not")
    return embedder


def _chunked(embedder: nn.Module, prompts: Sequence[str]) -> list[list[Chunk]]:
    clip = _clip(embedder)
    return [chunk_prompt(prompt, clip.reader, clip.max_length - 2) for prompt in prompts]


def _encode(embedder: nn.Module, chunk: Chunk, clip_skip: int) -> Tensor:
    """Encodes one chunk as [1, 77, width], multiplied by its weights."""
    hidden = _clip(embedder).hidden_states(torch.tensor([chunk.ids]), clip_skip)
    if all(weight == 1 for weight in chunk.weights):
        return hidden
    return weigh(hidden, torch.tensor(chunk.weights, device=hidden.device))


def weigh(hidden: Tensor, weights: Tensor) -> Tensor:
    """Multiplies hidden states [1, L, width] by their tokens' weights [L], then all by old mean / new mean."""
    weighted = hidden * weights[:, None].to(hidden.dtype)
    return weighted * (hidden.float().mean() / weighted.float().mean()).to(hidden.dtype)
