"""Reads ComfyUI's prompts: weights in round brackets, escaped brackets, and embeddings by name."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from ldm.job import lora_name
from ldm.metadata.infotext import file_name

Weighted = tuple[str, float]

_MAX_LENGTH, _MAX_DEPTH = 20_000, 40
_EMBEDDING = re.compile(r"(?:(?<=[\s,])|^)embedding:([^\s,]+)")
_TAG = re.compile(r"<(?:lora|lyco|hypernet):[^<>]{1,200}>")
_ESCAPES = (("\\(", "\x00"), ("\\)", "\x01"))  # stand-ins that cannot be in a prompt
_SIGNS_OF_A1111 = re.compile(r"[\\()\[\]]")
_WORDS_OF_A1111 = re.compile(r"\b(BREAK|AND)\b")
_TOKENS_AT_ONCE = 75


class Prompt(NamedTuple):
    """A prompt's texts with their weights, the embeddings that it names, and its tags, which ComfyUI ignores."""

    parts: tuple[Weighted, ...]
    embeddings: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()

    @property
    def is_weighted(self) -> bool:
        """Whether any weight differs from 1."""
        return any(weight != 1 for _, weight in self.parts)

    @property
    def text(self) -> str:
        """The text without its weights."""
        return "".join(text for text, _ in self.parts)

    @property
    def may_be_long(self) -> bool:
        """Whether it may have more tokens than a text encoder reads at once; each is a byte or more."""
        return len(self.text.encode("utf-8", "replace")) > _TOKENS_AT_ONCE

    @property
    def is_long(self) -> bool:
        """Whether it has more tokens than a text encoder reads at once; each word and sign is one or more."""
        return len(re.findall(r"\w+|[^\w\s]+", self.text)) > _TOKENS_AT_ONCE

    def as_a1111(self) -> str:
        """Returns the same texts and weights in the syntax of `ldm.prompts.weights`."""
        return "".join(
            _literal(text) if weight == 1 else f"({_literal(text)}:{_number(weight)})"
            for text, weight in self.parts
            if text
        )


def parse_prompt(prompt: str) -> Prompt:
    """Parses a prompt as ComfyUI's text encoder does.

    (x) is times 1.1, nested ones multiply, but (x:1.2) is 1.2 whatever is around it; a bracket that is not closed
    is text, and so are square brackets, braces, BREAK and AND. A prompt of more than 20,000 characters is text.
    """
    prompt = re.sub(r"[\x00\x01]", " ", prompt)
    tags = tuple(_TAG.findall(prompt))
    prompt = _TAG.sub("", prompt)
    for sign, stand_in in _ESCAPES:
        prompt = prompt.replace(sign, stand_in)
    read = list(_weighted(prompt, 1.0, 0)) if len(prompt) <= _MAX_LENGTH else [(prompt, 1.0)]
    embeddings: list[str] = []
    parts: list[Weighted] = []
    for text, weight in read:
        for sign, stand_in in _ESCAPES:
            text = text.replace(stand_in, sign[1:])
        embeddings += [_embedding(match[1]) for match in _EMBEDDING.finditer(text)]
        parts.append((_EMBEDDING.sub(lambda match: _embedding(match[1]), text), weight))
    return Prompt(tuple(parts), tuple(embeddings), tags)


def _weighted(text: str, weight: float, depth: int) -> Iterator[Weighted]:
    for part in _groups(text):
        if not (part.startswith("(") and part.endswith(")") and len(part) > 1) or depth > _MAX_DEPTH:
            yield part, weight
            continue
        inner, colon, number = part[1:-1].rpartition(":")
        own = _weight(number) if colon and inner else None
        if own is None:
            yield from _weighted(part[1:-1], weight * 1.1, depth + 1)
        else:
            yield from _weighted(inner, own, depth + 1)


def _groups(text: str) -> Iterator[str]:
    """Yields the outermost bracketed parts of a text, and the text between them."""
    level, start = 0, 0
    for i, sign in enumerate(text):
        if sign == "(":
            if level == 0 and i > start:
                yield text[start:i]
                start = i
            level += 1
        elif sign == ")":
            level -= 1
            if level == 0:
                yield text[start : i + 1]
                start = i + 1
    if start < len(text):
        yield text[start:]


def _weight(text: str) -> float | None:
    try:
        weight = float(text)
    except ValueError:
        return None
    return weight if math.isfinite(weight) and abs(weight) < 1e6 else None


def _embedding(name: str) -> str:
    return lora_name(file_name(name))


def _literal(text: str) -> str:
    """Returns text in which the web UI's syntax is literal; keywords in lower case give the same tokens."""
    text = _SIGNS_OF_A1111.sub(lambda match: f"\\{match[0]}", text)
    return _WORDS_OF_A1111.sub(lambda match: match[0].lower(), text)


def _number(weight: float) -> str:
    return f"{weight:.4f}".rstrip("0").rstrip(".")
