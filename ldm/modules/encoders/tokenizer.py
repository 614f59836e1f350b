"""CLIP's tokenizer without a network: text to the same token ids as OpenAI's tokenizer.

Cleaning and splitting are Python, the byte-pair merges run in the Rust library `tokenizers`. Nothing here
needs torch, and the libraries are imported only when a tokenizer is built.
"""

from __future__ import annotations

import gzip
import hashlib
import html
import importlib.util
import io
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from ldm.files import read_side_file
from ldm.json_value import as_object, load_json
from ldm.util import InputError, printable

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
END_OF_WORD = "</w>"
VOCABULARY_SIZE = 49408
CONTEXT_LENGTH = 77

_TABLE = "bpe_simple_vocab_16e6.txt.gz"
_TABLE_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
_WORD = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
_KNOWN_TEXT = "a photograph of an astronaut riding a horse"
_KNOWN_IDS = [49406, 320, 8853, 539, 550, 18376, 6765, 320, 4558, 49407]


def openai_tables() -> list[Path]:
    """Returns where to look for the token table of the installed package `openai-clip`, which is not imported."""
    spec = importlib.util.find_spec("clip")
    folders = (spec.submodule_search_locations if spec else None) or []
    return [Path(folder) / _TABLE for folder in folders]


class Stretch(NamedTuple):
    """A part of a cleaned text, where it begins, and its ids if it is a placeholder (else empty)."""

    start: int
    text: str
    ids: Sequence[int]


class CLIPTokenizer:
    """Turns prompts into CLIP token ids and back.

    Build it with `openai()` or `from_folder()`. Ids are in [0, size); `begin_id` is size - 2, `end_id` size - 1.
    A table of OpenAI's size (49,408) that is not OpenAI's, or one that is not laid out as CLIP's, is an
    `InputError`: a wrong one would silently ruin every image.
    """

    def __init__(self, vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]], source: str) -> None:
        """Builds from token ids and merges in order of rank; `source` names their origin in errors."""
        import regex
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers

        _check_table(vocabulary, merges, source)
        self.begin_id, self.end_id = vocabulary[BEGIN], vocabulary[END]
        self._words = regex.compile(_WORD, regex.IGNORECASE)
        self._bpe = Tokenizer(
            models.BPE(vocab=dict(vocabulary), merges=list(merges), end_of_word_suffix=END_OF_WORD)
        )
        self._bpe.add_special_tokens([BEGIN, END])
        self._bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self._bpe.decoder = decoders.ByteLevel()
        self.size = len(vocabulary)
        self._placeholders: Mapping[str, Sequence[int]] = {}
        self._triggers: regex.Pattern[str] | None = None
        if self.size == VOCABULARY_SIZE and self.encode(_KNOWN_TEXT) != _KNOWN_IDS:
            raise InputError(f"{source} is not CLIP's token table: it gives other ids for a known sentence")

    @classmethod
    def openai(cls) -> CLIPTokenizer:
        """Builds the tokenizer from the table of the installed package `openai-clip` (not imported).

        The table is read once; the tokenizers of a process share it, and have placeholders of their own.
        """
        table = next((path for path in openai_tables() if path.is_file()), None)
        if table is None:
            raise InputError(f"CLIP's token table {_TABLE} is not installed: run `pip install openai-clip`")
        found = table.stat()
        return copy(cls._of_table(table, found.st_size, found.st_mtime_ns))

    @classmethod
    @lru_cache(maxsize=1)
    def _of_table(cls, table: Path, size: int, changed: int) -> CLIPTokenizer:
        """Builds the tokenizer of a table; another size or time of its file is another table."""
        merges = _read_openai_merges(table)
        return cls(_openai_vocabulary(merges), merges, printable(table))

    @classmethod
    def from_folder(cls, path: str | Path) -> CLIPTokenizer:
        """Builds the tokenizer from a folder with `vocab.json` and `merges.txt`, the layout of transformers."""
        folder = Path(path)
        return cls(
            _read_vocabulary(folder / "vocab.json"), _read_merges(folder / "merges.txt"), printable(folder)
        )

    def table(self) -> tuple[dict[str, int], list[tuple[str, str]]]:
        """Returns the token ids and the merges in order of rank, the arguments of the constructor."""
        model = json.loads(self._bpe.to_str())["model"]
        return model["vocab"], [(left, right) for left, right in model["merges"]]

    def __call__(
        self, texts: Sequence[str], max_length: int = CONTEXT_LENGTH, pad_id: int | None = None
    ) -> list[list[int]]:
        """Returns the ids of each text, cut or padded to `max_length` (at least 2).

        A text that is cut keeps the end token as its last; padding is `pad_id`, by default the end token.
        """
        padding = self.end_id if pad_id is None else pad_id
        rows = [_cut(self.encode(text), max_length) for text in texts]
        return [row + [padding] * (max_length - len(row)) for row in rows]

    def use_placeholders(self, placeholders: Mapping[str, Sequence[int]]) -> None:
        """Maps these texts, as cleaned by `clean`, to new ids from `size` upward from now on.

        A placeholder is one or more whole words: next to a letter at its end there is no other letter, and
        next to a digit no digit. Of several that match the longest is used.
        """
        import regex

        self._placeholders = dict(placeholders)
        longest_first = sorted(self._placeholders, key=len, reverse=True)
        self._triggers = regex.compile("|".join(map(_whole_words, longest_first))) if placeholders else None

    def placeholders_in(self, text: str) -> list[str]:
        """Returns the placeholders in a text, in order."""
        return [stretch.text for stretch in self.stretches(clean(text)) if stretch.ids]

    def stretches(self, cleaned: str) -> Iterator[Stretch]:
        """Yields the parts of a cleaned text: plain ones and placeholders, in order."""
        end = 0
        for match in self._triggers.finditer(cleaned) if self._triggers else ():
            yield Stretch(end, cleaned[end : match.start()], ())
            yield Stretch(match.start(), match.group(), self._placeholders[match.group()])
            end = match.end()
        yield Stretch(end, cleaned[end:], ())

    def encode(self, text: str) -> list[int]:
        """Returns the ids of the whole text between the begin and the end token, however many.

        A text that UTF-8 cannot encode (lone surrogates) is an `InputError`.
        """
        stretches = self.stretches(clean(text))
        ids = (id for stretch in stretches for id in stretch.ids or self._encode_words(stretch.text))
        return [self.begin_id, *ids, self.end_id]

    def split(self, text: str) -> list[str]:
        """Splits a cleaned text into words like OpenAI's code; each is tokenised separately."""
        return self._words.findall(text)

    def _encode_words(self, text: str) -> list[int]:
        return self._bpe.encode(self.split(text), is_pretokenized=True).ids

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of the ids in lower case, a space between words, without begin, end and padding."""
        text = self._bpe.decode(list(ids), skip_special_tokens=True)
        return text.replace(END_OF_WORD, " ").rstrip()

    def cut_words(self, text: str, max_length: int = CONTEXT_LENGTH) -> str:
        """Returns the end of the cleaned text that does not fit into `max_length` tokens; empty if all fits."""
        cleaned = clean(text)
        starts = [start for stretch in self.stretches(cleaned) for start in self._token_starts(stretch)]
        kept = max_length - 2  # besides begin and end
        return cleaned[starts[kept] :] if len(starts) > kept else ""

    def _token_starts(self, stretch: Stretch) -> list[int]:
        """Returns the position in the cleaned text of each token of a stretch."""
        if stretch.ids:
            return [stretch.start] * len(stretch.ids)
        words = list(self._words.finditer(stretch.text))
        encoding = self._bpe.encode([word.group() for word in words], is_pretokenized=True)
        return [
            stretch.start + words[word].start() + begin
            for word, (begin, _) in zip(encoding.word_ids, encoding.offsets, strict=True)
            if word is not None
        ]


def checked(text: str) -> str:
    """Returns the text itself; `InputError` for lone surrogates, which come from command lines that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"the prompt is not valid text ({printable(text[error.start])} at position {error.start});"
            " pass it as UTF-8"
        ) from None
    return text


def clean(text: str) -> str:
    """Returns the text as CLIP reads it: encoding errors repaired, HTML entities resolved, lower case.

    Raises the errors of `checked`.
    """
    checked(text)
    if not (text.isascii() and text.isprintable()):  # ftfy keeps plain text; its import takes 40 ms
        import ftfy

        text = ftfy.fix_text(text)
    return " ".join(html.unescape(html.unescape(text)).split()).lower()


def _whole_words(placeholder: str) -> str:
    """Returns the pattern of a placeholder that is not part of a longer word or number."""
    import regex

    before, after = (r"\p{L}" if end.isalpha() else r"\p{N}" for end in (placeholder[0], placeholder[-1]))
    left = f"(?<!{before})" if placeholder[0].isalnum() else ""
    right = f"(?!{after})" if placeholder[-1].isalnum() else ""
    return f"{left}{regex.escape(placeholder)}{right}"


def _cut(ids: list[int], max_length: int) -> list[int]:
    if max_length < 2:
        raise ValueError(f"max_length is {max_length}, but begin and end token need 2")
    return ids if len(ids) <= max_length else [*ids[: max_length - 1], ids[-1]]


def _byte_characters() -> list[str]:
    """Returns the characters that represent the 256 bytes, in the order of their ids: printable ones first."""
    printable_bytes = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = 256 - len(printable_bytes)
    return [chr(code) for code in (*printable_bytes, *range(256, 256 + others))]


def _openai_vocabulary(merges: Sequence[tuple[str, str]]) -> dict[str, int]:
    """Returns token ids by OpenAI's rule: bytes, bytes that end a word, merges by rank, begin, end."""
    characters = _byte_characters()
    tokens = [*characters, *(c + END_OF_WORD for c in characters), *(a + b for a, b in merges), BEGIN, END]
    return {token: index for index, token in enumerate(tokens)}


def _read_openai_merges(table: Path) -> list[tuple[str, str]]:
    count = VOCABULARY_SIZE - 2 * 256 - 2
    try:
        data = table.read_bytes()
        with gzip.open(io.BytesIO(data), "rt", encoding="utf-8", newline="\n") as file:
            merges = _parse_merges(islice(file, 1, 1 + count), table)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise _unreadable(table, error) from None
    if len(merges) != count:
        raise InputError(f"{printable(table)} is damaged: it holds {len(merges)} merges instead of {count}")
    if hashlib.sha256(data).hexdigest() != _TABLE_SHA256:
        raise InputError(
            f"{printable(table)} is not the table of OpenAI: reinstall it, pip install openai-clip"
        )
    return merges


def _read_merges(path: Path) -> list[tuple[str, str]]:
    try:
        lines = io.StringIO(read_side_file(path).decode(), newline=None)
    except UnicodeDecodeError as error:
        raise _unreadable(path, error) from None
    return _parse_merges((line for line in lines if not line.startswith("#version")), path)


def _parse_merges(lines: Iterable[str], path: Path) -> list[tuple[str, str]]:
    merges: list[tuple[str, str]] = []
    for line in lines:
        left, _, right = line.rstrip("\n").partition(" ")
        if not left or not right:
            raise InputError(f"{printable(path)} is not a list of merges: {line[:80]!a} is not a pair")
        merges.append((left, right))
    return merges


def _read_vocabulary(path: Path) -> dict[str, int]:
    try:
        table = load_json(read_side_file(path))
    except InputError:
        raise
    except ValueError as error:
        raise _unreadable(path, error) from None
    ids = as_object(table)
    vocabulary = {token: i for token, i in ids.items() if isinstance(i, int) and not isinstance(i, bool)}
    if len(vocabulary) < len(ids) or not isinstance(table, dict):
        raise InputError(f"{printable(path)} is not a vocabulary: it must map tokens to whole numbers")
    return vocabulary


def _check_table(vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]], source: str) -> None:
    size = len(vocabulary)
    if size < 2 * 256 + 2 or sorted(vocabulary.values()) != list(range(size)):
        raise InputError(
            f"{source} is not a token table: its {size} tokens lack the ids 0 to {size - 1}, or are fewer than 514"
        )
    if (vocabulary.get(BEGIN), vocabulary.get(END)) != (size - 2, size - 1):
        raise InputError(f"{source} is not a CLIP token table: its last two tokens are not {BEGIN} and {END}")
    for left, right in merges:
        if not (left in vocabulary and right in vocabulary and left + right in vocabulary):
            raise InputError(f"{source}: the merge {printable(f'{left} {right}')!r} is not in the vocabulary")


def _unreadable(path: Path, error: Exception) -> InputError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return InputError(f"cannot read the token table {printable(path)}: {printable(reason)}")
