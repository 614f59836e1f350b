"""Parses prompt weights and long prompts by the rules of AUTOMATIC1111's web UI.

(x) times 1.1, [x] divided by 1.1, (x:1.3) times 1.3, nested weights multiply; backslash before a bracket or a
backslash for a literal one; BREAK begins a new chunk of 75 tokens.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ldm.modules.encoders.tokenizer import CLIPTokenizer
from ldm.prompts.editing import MAX_DEPTH, TOO_DEEP
from ldm.util import InputError, printable

FACTORS = {"(": 1.1, "[": 1 / 1.1}
COMMA_REACH = 20  # a full chunk ends at its last comma if that is among this many last tokens

Weighted = tuple[str, float]

_SIGN = re.compile(
    r"""
    \\[\\()\[\]] | \\ | [(\[]
    | : \s* (?P<weight> [+-]? [.\d]+ ) \s* \)
    | [)\]] | [^\\()\[\]:]+ | :
    """,
    re.VERBOSE,
)
_BREAK = re.compile(r"\s*\bBREAK\b\s*")


def parse_weights(prompt: str) -> list[list[Weighted]]:
    """Returns the sections of a prompt between its BREAKs, each as texts and their weights.

    An unclosed bracket extends to the end, a stray closing one is text, a lone backslash is dropped, neighbours of
    equal weight are one text. BREAK counts inside brackets, too. `InputError` for a weight that is not a finite
    number. What changes from step to step, and AND, `ldm.prompts.editing` reads before.
    """
    parts = _Parts()
    for match in _SIGN.finditer(prompt):
        sign = match[0]
        if sign.startswith("\\"):
            parts.add(sign[1:])
        elif sign in FACTORS:
            parts.open(sign)
        elif not parts.close(sign, match["weight"]):
            parts.add_text(sign)
    return [_merged(section) for section in parts.sections()]


class _Parts:
    """Texts and their weights, None for BREAK, and for each open bracket the index of the text after it."""

    def __init__(self) -> None:
        self._parts: list[tuple[str | None, float]] = []
        self._open: dict[str, list[int]] = {sign: [] for sign in FACTORS}

    def add(self, text: str | None) -> None:
        self._parts.append((text, 1.0))

    def add_text(self, text: str) -> None:
        """Adds a text that may contain BREAK."""
        first, *rest = _BREAK.split(text)
        self.add(first)
        for part in rest:
            self.add(None)
            self.add(part)

    def open(self, sign: str) -> None:
        self._open[sign].append(len(self._parts))
        if sum(map(len, self._open.values())) > MAX_DEPTH:
            raise InputError(TOO_DEEP)

    def close(self, sign: str, weight: str | None) -> bool:
        """Scales the texts that a closing bracket closes, with or without a weight; False if no bracket is open."""
        opening = {")": "(", "]": "["}.get(sign[-1], "")
        starts = self._open.get(opening)
        if not starts:
            return False
        self._scale(starts.pop(), FACTORS[opening] if weight is None else _number(weight))
        return True

    def sections(self) -> Iterator[list[Weighted]]:
        """Closes open brackets; yields the sections between BREAKs."""
        for sign, starts in self._open.items():
            for start in starts:
                self._scale(start, FACTORS[sign])
        section: list[Weighted] = []
        for text, weight in self._parts:
            if not math.isfinite(weight):
                raise InputError("the prompt's weights multiply to no finite number; use smaller ones")
            if text is None:
                yield section
                section = []
            else:
                section.append((text, weight))
        yield section

    def _scale(self, start: int, factor: float) -> None:
        self._parts[start:] = [(text, weight * factor) for text, weight in self._parts[start:]]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(
            f"the prompt's weight {printable(text)[:80]} is not a number; write \\( and \\) for literal brackets"
        ) from None


def _merged(section: Sequence[Weighted]) -> list[Weighted]:
    """Joins neighbours of equal weight, so that a word written in pieces becomes one word's tokens."""
    merged: list[Weighted] = []
    for text, weight in section:
        if merged and merged[-1][1] == weight:
            text = merged.pop()[0] + text
        merged.append((text, weight))
    return merged


@dataclass(frozen=True, slots=True)
class Chunk:
    """The text encoder's input: token ids from the begin to the end token, padded, and their weights."""

    ids: tuple[int, ...]
    weights: tuple[float, ...]


def chunk_prompt(prompt: str, tokenizer: CLIPTokenizer, length: int = 75) -> list[Chunk]:
    """Splits a prompt into chunks of `length` tokens between the begin and the end token; the end token also pads.

    There is at least one; an empty section between BREAKs is a chunk, an empty one after the last BREAK is not.
    See `parse_weights` for the syntax and the errors.
    """
    *firsts, last = [_tokens(section, tokenizer) for section in parse_weights(prompt)]
    sections = [*firsts, last] if last or not firsts else firsts
    pieces = itertools.chain.from_iterable(_pieces(tokens, tokenizer, length) for tokens in sections)
    return [_framed(piece, tokenizer, length) for piece in pieces]


Token = tuple[int, float]


def _tokens(section: Sequence[Weighted], tokenizer: CLIPTokenizer) -> list[Token]:
    """Returns ids and weights; each text is tokenised separately."""
    return [(token, weight) for text, weight in section for token in tokenizer.encode(text)[1:-1]]


def _pieces(tokens: Sequence[Token], tokenizer: CLIPTokenizer, length: int) -> Iterator[Sequence[Token]]:
    """Yields pieces of at most `length` tokens, see `_cut`."""
    comma, start = tokenizer.encode(",")[1], 0
    while len(tokens) - start > length:
        ids = [token for token, _ in tokens[start : start + length + 1]]
        cut = start + _cut(ids, comma, tokenizer.size)
        yield tokens[start:cut]
        start = cut
    yield tokens[start:]


def _cut(ids: Sequence[int], comma: int, size: int) -> int:
    """Returns how many of the ids, without the last one, make a chunk.

    They end before an embedding of several vectors that does not fit (ids from `size` upward, in sequence), or
    after a comma that is among the last few, unless a comma comes next.
    """
    length = begin = len(ids) - 1
    while begin and ids[begin] > size and ids[begin] == ids[begin - 1] + 1:
        begin -= 1
    if 0 < begin < length:
        return begin
    recent = range(max(0, length - COMMA_REACH), length)
    commas = [i + 1 for i in recent if ids[i] == comma and ids[length] != comma]
    return max(commas, default=length)


def _framed(piece: Sequence[Token], tokenizer: CLIPTokenizer, length: int) -> Chunk:
    padding = length - len(piece) + 1  # the end token among it
    return Chunk(
        (tokenizer.begin_id, *(token for token, _ in piece), *[tokenizer.end_id] * padding),
        (1.0, *(weight for _, weight in piece), *[1.0] * padding),
    )
