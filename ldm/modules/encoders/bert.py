"""The text encoder of the LAION-400M latent diffusion model: BERT's tokenizer and a transformer encoder.

Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models", section 4.3.1.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

from torch import Tensor, nn

from ldm.files import read_side_file
from ldm.modules.attention import CrossAttention, FeedForward
from ldm.modules.encoders.tokenizer import checked
from ldm.places import find, hub_files
from ldm.util import InputError, printable

UNCASED = "bert-base-uncased"
OWN_VOCABULARY = "models/ldm/text2img-large/vocab.txt"

REPOSITORIES = (f"google-bert/{UNCASED}", UNCASED)  # the current name and the old one
VOCABULARY_FILE = "vocab.txt"
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_UNCASED_SIZE = 30522
_KNOWN_TEXT = "Hello, my dog is cute"
_KNOWN_IDS = [101, 7592, 1010, 2026, 3899, 2003, 10140, 102]


class SelfAttention(CrossAttention):
    """Multi-head self-attention over [B, L, width] whose last layer is named as in published checkpoints."""

    def __init__(self, width: int):
        super().__init__(width)
        self.to_out = nn.Linear(self.to_q.out_features, width)


class Residual(nn.Sequential):
    """Adds to its input the output of its children in sequence."""

    def forward(self, input: Tensor) -> Tensor:
        return input + cast("Tensor", super().forward(input))


class PreNormLayers(nn.Module):
    """`depth` times attention and feed-forward, each after a layer norm and with a residual."""

    def __init__(self, width: int, depth: int):
        super().__init__()
        blocks = (block for _ in range(depth) for block in (SelfAttention(width), FeedForward(width)))
        self.layers = nn.Sequential(*(Residual(nn.LayerNorm(width), block) for block in blocks))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class PositionEmbedding(nn.Module):
    """One learnt vector for each position."""

    def __init__(self, positions: int, width: int):
        super().__init__()
        self.emb = nn.Embedding(positions, width)

    def forward(self, length: int) -> Tensor:
        """Returns the vectors of the first positions [length, width]."""
        return self.emb.weight[:length]


class TextTransformer(nn.Module):
    """Ids [B, L] -> hidden states [B, L, width] after the last layer norm; all tokens, with padding, attend to all.

    `dropout` acts on the embeddings in training. `to_logits` is part of published checkpoints, though only the
    training of a language model would use it.
    """

    def __init__(self, tokens: int, positions: int, width: int, depth: int, dropout: float = 0.0):
        super().__init__()
        self.token_emb = nn.Embedding(tokens, width)
        self.pos_emb = PositionEmbedding(positions, width)
        self.emb_dropout = nn.Dropout(dropout)
        self.attn_layers = PreNormLayers(width, depth)
        self.norm = nn.LayerNorm(width)
        self.to_logits = nn.Linear(width, tokens)

    def forward(self, ids: Tensor) -> Tensor:
        embedded = self.token_emb(ids) + self.pos_emb(ids.shape[1])
        return self.norm(self.attn_layers(self.emb_dropout(embedded)))


class BERTTokenizer:
    """Turns prompts into `max_length` ids of a WordPiece vocabulary (Devlin et al. 2019), in lower case.

    `[CLS]`, the text, `[SEP]`, then `[PAD]`; a text that is cut keeps its `[SEP]`. A vocabulary without these
    tokens, with one token twice, or of BERT's size (30,522) that is not BERT's, is an `InputError`: a wrong one
    would silently ruin every image.
    """

    def __init__(self, vocabulary: Sequence[str], max_length: int, source: str):
        """Builds from the tokens in order of their ids; `source` names their origin in errors."""
        from tokenizers.implementations import BertWordPieceTokenizer

        _check_vocabulary(vocabulary, source)
        self.size = len(vocabulary)
        self._wordpiece = BertWordPieceTokenizer({token: index for index, token in enumerate(vocabulary)})
        if self.size == _UNCASED_SIZE and self._wordpiece.encode(_KNOWN_TEXT).ids != _KNOWN_IDS:
            raise InputError(
                f"{source} is not the vocabulary of {UNCASED}: it gives other ids for a known sentence"
            )
        self._wordpiece.enable_truncation(max_length)
        self._wordpiece.enable_padding(length=max_length, pad_id=vocabulary.index("[PAD]"))

    @classmethod
    def from_file(cls, path: str | Path, max_length: int) -> BERTTokenizer:
        """Builds the tokenizer of a `vocab.txt`: a token a line, whose number is its id."""
        return cls(_read_vocabulary(Path(path)), max_length, printable(path))

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of each text. A text that UTF-8 cannot encode (lone surrogates) is an `InputError`."""
        return [self._wordpiece.encode(checked(text)).ids for text in texts]

    def cut_words(self, text: str) -> str:
        """Returns the end of the text that does not fit; empty if all fits."""
        encoding = self._wordpiece.encode(checked(text))
        return text[max(end for _, end in encoding.offsets) :].strip() if encoding.overflowing else ""


def find_vocabulary(version: str = UNCASED) -> Path:
    """Finds the vocabulary file of `version` on this computer; nothing is downloaded.

    `version` is such a file, a folder that holds `vocab.txt`, or "bert-base-uncased": then the file is searched at
    `OWN_VOCABULARY`, here or in the toolkit's folder, and in the Hugging Face cache. `InputError` if there is none.
    """
    path = next(filter(os.path.isfile, _places(version)), None)
    if path is not None:
        return path
    raise InputError(
        f"{OWN_VOCABULARY} does not exist; the text encoder needs BERT's vocabulary there: get it from "
        f"https://huggingface.co/{REPOSITORIES[0]}/resolve/main/{VOCABULARY_FILE}"
        if version in REPOSITORIES
        else f"the text encoder's vocabulary {printable(version)} is neither a file nor a folder "
        f"with {VOCABULARY_FILE} nor {UNCASED}; nothing is downloaded"
    )


def _places(version: str) -> Iterator[Path]:
    yield from (find(version), find(version) / VOCABULARY_FILE)
    if version in REPOSITORIES:
        yield find(OWN_VOCABULARY)
        yield from hub_files(REPOSITORIES, [VOCABULARY_FILE])


def _read_vocabulary(path: Path) -> list[str]:
    try:
        text = io.StringIO(read_side_file(path).decode("utf-8-sig"), newline=None).read()
    except UnicodeDecodeError:
        raise InputError(f"cannot read the vocabulary {printable(path)}: it is not UTF-8 text") from None
    return text.removesuffix("\n").split("\n")  # other line separators are tokens


def _check_vocabulary(vocabulary: Sequence[str], source: str) -> None:
    missing = [token for token in _SPECIAL if token not in vocabulary]
    if missing:
        raise InputError(f"{source} is not a vocabulary of BERT: it lacks {', '.join(missing)}")
    if len(set(vocabulary)) != len(vocabulary):
        raise InputError(f"{source} is not a vocabulary of BERT: it has a token twice")
