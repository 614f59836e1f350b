"""CLIP's text and image encoders, with the parameter names of published checkpoints (Radford et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.util import InputError, only_with


def _position_ids(count: int) -> Tensor:
    """Returns [[0, 1, ...]], computed, so that it is never on the meta device on which a model may be built."""
    return torch.arange(count, device="cpu")[None]


class CLIPEmbeddings(nn.Module):
    """Token plus position embeddings: ids [B, L] -> [B, L, width], L at most `positions`.

    Ids from `tokens` upward are the rows of `added` [n, width], which is not part of the state dict.
    """

    position_ids: Tensor
    added: Tensor | None

    def __init__(self, tokens: int, positions: int, width: int):
        super().__init__()
        self.token_embedding = nn.Embedding(tokens, width)
        self.position_embedding = nn.Embedding(positions, width)
        self.register_buffer("position_ids", _position_ids(positions))
        self.register_buffer("added", None, persistent=False)

    def forward(
        self,
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """`inputs_embeds` [B, L, width] replace the ids' vectors; positions are 0, 1, ... by default."""
        if inputs_embeds is None:
            if input_ids is None:
                raise InputError("CLIP's embeddings need input_ids or inputs_embeds")
            inputs_embeds = self._tokens(input_ids)
        places = self.position_embedding.weight
        return inputs_embeds + (
            places[: inputs_embeds.shape[1]] if position_ids is None else places[position_ids]
        )

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

    def forward(self, images: Tensor) -> Tensor:
        patches = rearrange(self.patch_embedding(images), "n c h w -> n (h w) c")
        start = self.class_embedding.expand(len(patches), 1, -1)
        return torch.cat([start, patches], dim=1) + self.position_embedding.weight


class CLIPAttention(nn.Module):
    """Multi-head self-attention; if `causal`, a token attends to itself and those before it, else to all."""

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
    """Attention and feed-forward, each after a layer norm and with a residual."""

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

    def forward(self, x: Tensor, seen: list[Tensor] | None = None, count: int | None = None) -> Tensor:
        """Runs the first `count` layers, or all of them; their outputs are appended to `seen`."""
        for layer in self.layers[:count]:
            x = layer(x)
            if seen is not None:
                seen.append(x)
        return x


@dataclass
class TextOutput:
    """The output of transformers' text encoder, by the same names, and by index without those that are None."""

    last_hidden_state: Tensor
    pooler_output: Tensor
    hidden_states: tuple[Tensor, ...] | None = None

    def to_tuple(self) -> tuple[Tensor | tuple[Tensor, ...], ...]:
        parts = (self.last_hidden_state, self.pooler_output, self.hidden_states)
        return tuple(part for part in parts if part is not None)

    def __getitem__(self, key: str | int | slice) -> Any:
        return getattr(self, key) if isinstance(key, str) else self.to_tuple()[key]


class CLIPTextTransformer(nn.Module):
    """Ids [B, L] -> hidden states of the layers; the last one also after the final layer norm."""

    def __init__(self, tokens: int, positions: int, width: int, layers: int, heads: int, inner: int):
        super().__init__()
        self.embeddings = CLIPEmbeddings(tokens, positions, width)
        self.encoder = CLIPEncoder(width, layers, heads, inner)
        self.final_layer_norm = nn.LayerNorm(width)
        self.eos_token_id = tokens - 1

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        clip_skip: int = 1,
    ) -> TextOutput | tuple[Any, ...]:
        """Encodes ids [B, L]: `last_hidden_state` [B, L, width] after the final norm; `pooler_output` [B, width], its
        row at the first end token; with `output_hidden_states` the embeddings and each layer's states before it.

        With `clip_skip` N the last N - 1 layers are not run: the final norm follows the Nth layer from the end.
        With `return_dict` False a tuple. `InputError` for a `clip_skip` that leaves no layer, for a mask that hides
        tokens, and for `output_attentions`.
        """
        only_with("CLIPTextModel", output_attentions=(bool(output_attentions), False))
        if attention_mask is not None and not bool(attention_mask.all()):
            raise InputError(
                "CLIPTextModel: an attention_mask that hides tokens is not supported; leave it out"
            )
        layers = len(self.encoder.layers)
        if not 1 <= clip_skip <= layers:
            raise InputError(
                f"CLIP skip {clip_skip} leaves no layer of a text encoder with {layers}; give 1 to {layers}"
            )
        states = [self.embeddings(input_ids, position_ids)]
        seen = states if output_hidden_states else None
        last = self.final_layer_norm(self.encoder(states[0], seen, layers + 1 - clip_skip))
        ends = (input_ids == self.eos_token_id).int().argmax(dim=1)
        output = TextOutput(
            last,
            last[torch.arange(len(last), device=last.device), ends],
            tuple(states) if output_hidden_states else None,
        )
        return output.to_tuple() if return_dict is False else output


class CLIPTextModel(nn.Module):
    """CLIP's text encoder, called as transformers' class of this name, in the layout of published checkpoints."""

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
        inner = inner or 4 * width
        self.text_model = CLIPTextTransformer(tokens, positions, width, layers, heads, inner)
        self.config = SimpleNamespace(
            vocab_size=tokens,
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=positions,
            bos_token_id=tokens - 2,
            eos_token_id=tokens - 1,
            pad_token_id=tokens - 1,
        )

    def forward(self, *args: Any, **kwargs: Any) -> TextOutput:
        """See `CLIPTextTransformer.forward`."""
        return self.text_model(*args, **kwargs)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.get_input_embeddings().weight.dtype

    def get_input_embeddings(self) -> nn.Embedding:
        """Returns the table of the tokens' vectors."""
        return self.text_model.embeddings.token_embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replaces the table of the tokens' vectors."""
        self.text_model.embeddings.token_embedding = value
        self.config.vocab_size = value.num_embeddings

    def resize_token_embeddings(self, new_num_tokens: int | None = None) -> nn.Embedding:
        """Resizes the table to `new_num_tokens` rows: the existing ones, then small random ones."""
        old = self.get_input_embeddings()
        if new_num_tokens is None or new_num_tokens == old.num_embeddings:
            return old
        table = nn.Embedding(
            new_num_tokens, old.embedding_dim, device=old.weight.device, dtype=old.weight.dtype
        )
        kept = min(new_num_tokens, old.num_embeddings)
        with torch.no_grad():
            table.weight.normal_(std=0.02)
            table.weight[:kept] = old.weight[:kept]
        table.weight.requires_grad_(old.weight.requires_grad)
        self.set_input_embeddings(table)
        return table


class CLIPVisionTransformer(nn.Module):
    """Images [N, 3, side, side] -> the class token of the last layer [N, width], after the final layer norm."""

    def __init__(self, side: int, patch: int, width: int, layers: int, heads: int, inner: int):
        super().__init__()
        self.embeddings = CLIPVisionEmbeddings(side, patch, width)
        self.pre_layrnorm = nn.LayerNorm(width)  # the spelling of published checkpoints
        self.encoder = CLIPEncoder(width, layers, heads, inner, causal=False)
        self.post_layernorm = nn.LayerNorm(width)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.encoder(self.pre_layrnorm(self.embeddings(images)))
        return self.post_layernorm(tokens[:, 0])


class CLIPVisionModel(nn.Module):
    """The image encoder under the name `vision_model`, as in published checkpoints."""

    def __init__(self, side: int, patch: int, width: int, layers: int, heads: int, inner: int):
        super().__init__()
        self.vision_model = CLIPVisionTransformer(side, patch, width, layers, heads, inner)

    def forward(self, images: Tensor) -> Tensor:
        """Encodes normalised images [N, 3, side, side] as pooled states [N, width]."""
        return self.vision_model(images)
