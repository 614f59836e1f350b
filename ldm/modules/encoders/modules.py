"""Conditioning models: what turns prompts into what the U-Net's cross-attention looks at."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.modules.encoders.clip import CLIPTextModel
from ldm.modules.encoders.tokenizer import CLIPTokenizer
from ldm.util import InputError, printable

logger = logging.getLogger(__name__)

OPENAI_VOCABULARIES = ("openai/clip-vit-large-patch14", "openai/clip-vit-base-patch32")


class AbstractEncoder(nn.Module):
    """A conditioning model: `encode` turns a list of prompts into a tensor."""

    def encode(self, *args: object) -> Tensor:
        """Prompts -> conditioning."""
        raise TypeError(f"{type(self).__name__} does not define encode")

    def cut_words(self, prompt: str) -> str:
        """The end of a prompt that the model does not see because the prompt is too long."""
        return ""


class FrozenCLIPEmbedder(AbstractEncoder):
    """Prompts -> hidden states of a CLIP text tower [B, max_length, width].

    The tower's weights are the checkpoint's; nothing is downloaded. `version` chooses the vocabulary: OpenAI's
    (its models' names), or a folder with `vocab.json` and `merges.txt`. `device` is accepted and not used: the
    tower lies where the rest of the model lies. The other parameters give the
    tower's shape; they default to ViT-L/14's text tower, the one of Stable Diffusion v1.
    """

    def __init__(
        self,
        version: str = "openai/clip-vit-large-patch14",
        device: str | None = None,
        max_length: int = 77,
        tokens: int = 49408,
        width: int = 768,
        layers: int = 12,
        heads: int = 12,
    ):
        super().__init__()
        self.version = version
        self.max_length = max_length
        self.transformer = CLIPTextModel(tokens, max_length, width, layers, heads)
        self.freeze()

    @cached_property
    def tokenizer(self) -> CLIPTokenizer:
        """The vocabulary named by `version`, read when it is first needed."""
        if Path(self.version).is_dir():
            tokenizer = CLIPTokenizer.from_folder(self.version)
        elif self.version in OPENAI_VOCABULARIES:
            tokenizer = CLIPTokenizer.openai()
        else:
            raise InputError(
                f"the text model's vocabulary {printable(self.version)} is neither a folder with vocab.json and "
                f"merges.txt nor one of {', '.join(OPENAI_VOCABULARIES)}; nothing is downloaded"
            )
        tokens = self.transformer.text_model.embeddings.token_embedding.num_embeddings
        if tokenizer.size != tokens:
            raise InputError(
                f"the vocabulary {printable(self.version)} has {tokenizer.size} entries, "
                f"the text model {tokens}; give the vocabulary that belongs to this checkpoint"
            )
        return tokenizer

    def freeze(self) -> None:
        """Evaluation mode, no gradients."""
        self.eval().requires_grad_(False)

    def forward(self, text: Sequence[str]) -> Tensor:
        for cut in filter(None, map(self.cut_words, text)):
            logger.warning(
                "prompt longer than %d tokens; this is cut off: %s", self.max_length - 2, printable(cut)
            )
        weight = self.transformer.text_model.embeddings.token_embedding.weight
        ids = self.tokenizer(list(text), max_length=self.max_length)
        return self.transformer(torch.tensor(ids, device=weight.device))

    def cut_words(self, prompt: str) -> str:
        return self.tokenizer.cut_words(prompt, self.max_length)

    def encode(self, text: Sequence[str]) -> Tensor:
        """Prompts -> [B, max_length, width]; a prompt too long is cut, with a warning that shows what is lost."""
        return self(text)
