"""Conditioning models, which encode prompts as the context of the U-Net's cross-attention."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.modules.encoders.bert import UNCASED, BERTTokenizer, TextTransformer, find_vocabulary
from ldm.modules.encoders.clip import CLIPTextModel
from ldm.modules.encoders.tokenizer import CLIPTokenizer
from ldm.util import InputError, printable

logger = logging.getLogger(__name__)

MOST_CUTS = 10  # prompts whose cut end is shown
MOST_SHOWN = 300  # characters of it
OPENAI_VOCABULARIES = ("openai/clip-vit-large-patch14", "openai/clip-vit-base-patch32")


def _check_size(vocabulary: str | Path, size: int, tokens: int) -> None:
    """Checks that a vocabulary has an entry for each of a text encoder's tokens, else an `InputError`."""
    if size != tokens:
        raise InputError(
            f"the vocabulary {printable(vocabulary)} has {size} entries, the text encoder {tokens}; "
            "give the vocabulary that belongs to this checkpoint"
        )


class AbstractEncoder(nn.Module):
    """A conditioning model: `encode` turns a list of prompts into a tensor."""

    _cuts_shown = 0

    def encode(self, *args: Any, **kwargs: Any) -> Tensor:
        """Encodes prompts as a conditioning."""
        raise TypeError(f"{type(self).__name__} does not define encode")

    def cut_words(self, prompt: str) -> str:
        """Returns the end of a prompt that the model does not see because the prompt is too long."""
        return ""

    def listed(self, text: str | Sequence[str]) -> list[str]:
        """Returns prompts as a list; a single text is one prompt, not its letters."""
        return [text] if isinstance(text, str) else list(text)

    def warn_of_cuts(self, prompts: Sequence[str], limit: int) -> None:
        """Logs the lost words of the first few prompts that are longer than `limit` tokens."""
        if self._cuts_shown > MOST_CUTS:
            return
        for cut in filter(None, map(self.cut_words, prompts)):
            self._cuts_shown += 1
            if self._cuts_shown > MOST_CUTS:
                logger.warning("more prompts are longer than %d tokens; --dry_run counts them", limit)
                return
            logger.warning(
                "prompt longer than %d tokens; this is cut off: %s", limit, printable(cut)[:MOST_SHOWN]
            )


class FrozenCLIPEmbedder(AbstractEncoder):
    """Prompts -> hidden states of a CLIP text encoder [B, max_length, width].

    Its weights are the checkpoint's; nothing is downloaded. `version` chooses the vocabulary: OpenAI's (its models'
    names), or a folder with `vocab.json` and `merges.txt`. `device` is accepted and not used: the text encoder is
    where the rest of the model is. The other parameters are its sizes; they default to ViT-L/14's, the text encoder
    of Stable Diffusion v1.
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
    def tokenizer(self) -> Any:
        """transformers' CLIPTokenizer with this encoder's vocabulary, for code that calls its methods.

        From then on prompts are read by it, or by the one that replaces it.
        """
        from ldm.modules.encoders.transformers_tokenizer import TransformersTokenizer

        return TransformersTokenizer(self.reader, self.max_length)

    @cached_property
    def reader(self) -> CLIPTokenizer:
        """The vocabulary named by `version`, read when it is first needed."""
        if Path(self.version).is_dir():
            tokenizer = CLIPTokenizer.from_folder(self.version)
        elif self.version in OPENAI_VOCABULARIES:
            tokenizer = CLIPTokenizer.openai()
        else:
            raise InputError(
                f"the text encoder's vocabulary {printable(self.version)} is neither a folder with vocab.json and "
                f"merges.txt nor one of {', '.join(OPENAI_VOCABULARIES)}; nothing is downloaded"
            )
        tokens = self.transformer.text_model.embeddings.token_embedding.num_embeddings
        _check_size(self.version, tokenizer.size, tokens)
        return tokenizer

    @property
    def device(self) -> torch.device:
        """The device of the text encoder. Assigning it, as in the original, moves nothing."""
        return self.transformer.device

    @device.setter
    def device(self, value: object) -> None:
        pass

    @property
    def width(self) -> int:
        """The length of a token's vector."""
        return self.transformer.text_model.embeddings.token_embedding.embedding_dim

    def use_embeddings(self, embeddings: Mapping[str, Tensor]) -> None:
        """Replaces these words, as cleaned by the tokenizer's `clean`, by vectors [n, width] each from now on.

        Each vector takes the place of one token (textual inversion, Gal et al. 2022).
        """
        tower = self.transformer.text_model.embeddings
        first = tower.token_embedding.num_embeddings
        ids: dict[str, range] = {}
        for word, vector in embeddings.items():
            ids[word] = range(first, first + len(vector))
            first += len(vector)
        device = tower.token_embedding.weight.device
        vectors = [vector.to(device, torch.float32) for vector in embeddings.values()]
        tower.added = torch.cat(vectors).detach() if vectors else None
        self.reader.use_placeholders(ids)

    def freeze(self) -> None:
        """Sets evaluation mode, without gradients."""
        self.eval().requires_grad_(False)

    def forward(self, text: str | Sequence[str], clip_skip: int = 1) -> Tensor:
        """Does the same as `encode`."""
        return self.hidden_states(self._ids(self.listed(text)), clip_skip)

    def hidden_states(self, ids: Tensor, clip_skip: int = 1) -> Tensor:
        """Encodes ids [B, L] as [B, L, width]; see `encode`."""
        skip = {"clip_skip": clip_skip} if clip_skip != 1 else {}  # which a replaced transformer may not know
        return self.transformer(input_ids=ids.to(self.transformer.device), **skip).last_hidden_state

    def _ids(self, texts: list[str]) -> Tensor:
        tokenizer = self.__dict__.get("tokenizer")
        if tokenizer is None or getattr(tokenizer, "reader", None) is self.reader:
            self.warn_of_cuts(texts, self.max_length - 2)
        if tokenizer is None:
            return torch.tensor(self.reader(texts, max_length=self.max_length))
        found = tokenizer(
            texts,
            truncation=True,
            max_length=self.max_length,
            return_length=True,
            return_overflowing_tokens=False,
            padding="max_length",
            return_tensors="pt",
        )
        return found["input_ids"]

    def cut_words(self, prompt: str) -> str:
        return self.reader.cut_words(prompt, self.max_length)

    def encode(self, text: str | Sequence[str], clip_skip: int = 1) -> Tensor:
        """Encodes prompts as [B, max_length, width]; one too long is cut, with a warning that shows the rest.

        With `clip_skip` N, in AUTOMATIC1111's count, the states are those of the Nth layer from the end, after the
        final norm: 1 is the last layer, 2 the last but one. `InputError` if that leaves no layer.
        """
        return self(text, clip_skip)


class BERTEmbedder(AbstractEncoder):
    """Prompts -> hidden states of a transformer encoder over BERT's tokens [B, max_seq_len, n_embed].

    The text encoder of `txt2img --laion400m`: `n_layer` layers of width `n_embed`, not BERT's weights in spite of
    the name. `version` chooses the vocabulary, see `find_vocabulary`. With `use_tokenizer` off it accepts ids
    only. `device` is accepted and not used.
    """

    def __init__(
        self,
        n_embed: int,
        n_layer: int,
        vocab_size: int = 30522,
        max_seq_len: int = 77,
        device: str | None = None,
        use_tokenizer: bool = True,
        embedding_dropout: float = 0.0,
        version: str = UNCASED,
    ):
        super().__init__()
        self.version = version
        self.max_length = max_seq_len
        self.use_tokenizer = use_tokenizer
        self.transformer = TextTransformer(vocab_size, max_seq_len, n_embed, n_layer, embedding_dropout)

    @cached_property
    def tokenizer(self) -> BERTTokenizer:
        """The vocabulary named by `version`, read when it is first needed."""
        if not self.use_tokenizer:
            raise InputError(
                "the text encoder takes no prompts: the config's use_tokenizer is off; turn it on"
            )
        path = find_vocabulary(self.version)
        tokenizer = BERTTokenizer.from_file(path, self.max_length)
        _check_size(path, tokenizer.size, self.transformer.token_emb.num_embeddings)
        return tokenizer

    def forward(self, text: str | Sequence[str] | Tensor) -> Tensor:
        """Encodes one or more prompts, or their ids [B, L], as [B, L, n_embed]."""
        if isinstance(text, Tensor):
            return self.transformer(text)
        text = self.listed(text)
        self.warn_of_cuts(text, self.max_length - 2)
        weight = self.transformer.token_emb.weight
        return self.transformer(torch.tensor(self.tokenizer(text), device=weight.device))

    def cut_words(self, prompt: str) -> str:
        return self.tokenizer.cut_words(prompt)

    def encode(self, text: str | Sequence[str] | Tensor) -> Tensor:
        """Does the same as `forward`; a prompt too long is cut, with a warning that shows the rest."""
        return self(text)
