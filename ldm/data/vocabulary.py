"""A small byte-pair vocabulary in CLIP's file format, learned from captions and common English words."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path

from ldm.modules.encoders.tokenizer import BEGIN, END, END_OF_WORD

Word = tuple[str, ...]  # its symbols: one a byte at first, longer ones once merged
Pair = tuple[str, str]

COMMON_WORDS = """
    i you he she it we they me him her us them my your his its our their this that these those who what which
    a an the and or but not no with without from into onto out of off at by for in on to up down over under
    between among through across along around about after before during near far here there where when while
    one two three four five six seven eight nine ten many more most some few every all each both other same
    be is are was were been being have has had do does did can could will would should may make made go goes
    get see look show give take put keep hold stand sit lie walk run fly play eat drink read write open close
    very so too also only just then now again always never still even well much like as than if because
    good bad new old young long short high low dark light bright soft hard hot cold warm clean empty full
    black brown gold silver colour color man woman boy girl child people face hand head eye hair cat dog horse
    bird fish animal tree flower grass leaf garden forest field hill mountain river lake sea sky sun moon
    star cloud rain snow fire water stone wood metal glass paper house home room wall door window roof floor
    table chair bed cup plate bottle bowl book lamp clock hat shirt shoe car bus train boat ship plane road
    street bridge city town day night morning evening summer winter food bread apple fruit cake photo
    photograph painting drawing sketch portrait landscape art style scene view close detailed realistic
    beautiful digital front back side top bottom middle left right corner edge shape object thing number word
"""

_SPLIT = re.compile(r"[^\W\d_]+|\d|[^\s\w]+")  # letters, single digits, signs: never across CLIP's splits


def train_vocabulary(captions: Iterable[str], size: int, folder: str | Path) -> int:
    """Writes `vocab.json` and `merges.txt` to `folder`; returns the number of tokens, at most `size`.

    Ids by OpenAI's rule: 256 bytes, the same 256 ending a word, the merges in order, begin, end. Fewer than
    `size` tokens come out if the words hold no more pairs. Raises `ValueError` for a size below 514.
    """
    room = size - 2 * 256 - 2
    if room < 0:
        raise ValueError(
            f"a vocabulary of {size} tokens is too small: the bytes, begin and end alone are 514"
        )
    merges = learn_merges(_count_words(captions), room)
    tokens = [*_alphabet(), *(left + right for left, right in merges), BEGIN, END]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    # Last: if this file exists, the vocabulary is complete.
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False) + "\n", encoding="utf-8")
    return len(tokens)


def learn_merges(words: Mapping[Word, int], count: int) -> list[Pair]:
    """Learns up to `count` merges: each joins the most frequent neighbours (of equals the first in order).

    `words` maps a word's symbols to how often it occurs. Byte-pair encoding: Sennrich et al. 2016,
    arXiv:1508.07909, algorithm 1.
    """
    merges: list[Pair] = []
    while len(merges) < count:
        pairs: Counter[Pair] = Counter()
        for word, times in words.items():
            for pair in pairwise(word):
                pairs[pair] += times
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        words = {_merge(word, best): times for word, times in words.items()}
    return merges


def _merge(word: Word, pair: Pair) -> Word:
    merged: list[str] = []
    i = 0
    while i < len(word):
        step = 2 if word[i : i + 2] == pair else 1
        merged.append("".join(word[i : i + step]))
        i += step
    return tuple(merged)


def _count_words(captions: Iterable[str]) -> Counter[Word]:
    """Counts the words of captions, and each common word once more, so that these come after the captions'."""
    from tokenizers.pre_tokenizers import ByteLevel

    as_bytes = ByteLevel(add_prefix_space=False, use_regex=False)
    words = Counter(word for text in (*captions, COMMON_WORDS) for word in _SPLIT.findall(text.lower()))
    counts: Counter[Word] = Counter()
    for word, times in words.items():
        [(symbols, _)] = as_bytes.pre_tokenize_str(word)
        counts[(*symbols[:-1], symbols[-1] + END_OF_WORD)] += times
    return counts


def _alphabet() -> list[str]:
    """Returns the 256 characters of bytes, in OpenAI's order (by code point), and the same ending a word."""
    from tokenizers.pre_tokenizers import ByteLevel

    characters = sorted(ByteLevel.alphabet())
    return [*characters, *(character + END_OF_WORD for character in characters)]
