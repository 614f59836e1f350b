"""transformers' CLIP tokenizer, applied to the words that `ldm.modules.encoders.tokenizer` reads in a text.

Importing this module imports transformers, which is slow; a run does not need it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import regex
from tokenizers import pre_tokenizers
from transformers import AddedToken, BatchEncoding
from transformers.models.clip import tokenization_clip

from ldm.modules.encoders.tokenizer import BEGIN, END, CLIPTokenizer, clean
from ldm.util import InputError


class TransformersTokenizer(tokenization_clip.CLIPTokenizer):
    """Supports every method of transformers' class, and returns the ids of `reader`.

    Added tokens have their ids where a text contains them literally; all other text is cleaned first.
    """

    def __init__(self, reader: CLIPTokenizer, max_length: int):
        vocabulary, merges = reader.table()
        super().__init__(vocabulary, merges, model_max_length=max_length)  # type: ignore[arg-type]
        self.reader = reader
        self.backend_tokenizer.normalizer = None
        self.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
            add_prefix_space=False, use_regex=False
        )

    def _encode_plus(self, text: Any, text_pair: Any = None, *args: Any, **kwargs: Any) -> BatchEncoding:
        if kwargs.pop("is_split_into_words", False):
            return super()._encode_plus(text, text_pair, *args, is_split_into_words=True, **kwargs)
        text, text_pair = (
            list(self._words(part))
            if isinstance(part, str)
            else part and [list(self._words(t)) for t in part]
            for part in (text, text_pair)
        )
        return super()._encode_plus(text, text_pair, *args, is_split_into_words=True, **kwargs)

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        """Returns the tokens of a text, under the method name of transformers' former class."""
        return self.tokenize(text, **kwargs)

    def _words(self, text: str) -> Iterator[str]:
        """Yields the words of a text for the backend, which looks up each separately."""
        added = {token for token in self.get_added_vocab() if token not in (BEGIN, END)}
        pattern = "|".join(map(regex.escape, sorted(added, key=len, reverse=True)))
        for part in regex.split(f"({pattern})", text) if added else [text]:
            if part in added:
                yield part
                continue
            for stretch in self.reader.stretches(clean(part)):
                yield from map(self._name, stretch.ids) if stretch.ids else self.reader.split(stretch.text)

    def _name(self, index: int) -> str:
        """Returns the token of a placeholder's id, which is in no text, since cleaned texts have no line break."""
        while len(self) <= index:
            self.add_tokens(AddedToken(f"\n{len(self)}\n", normalized=False, special=True))
        name = f"\n{index}\n"
        if self.convert_tokens_to_ids(name) != index:
            raise InputError(f"the token id {index} is both an embedding and a token that was added")
        return name
