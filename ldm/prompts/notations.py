"""Warns, once for each, of notations of other programs in lists and prompts that are read as text."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ldm.prompts.expand import WILDCARD
from ldm.prompts.files import MAX_LINE
from ldm.util import printable

logger = logging.getLogger(__name__)

_SHOWN = 60  # characters of a prompt in a message


@dataclass(frozen=True, slots=True)
class Notation:
    """A sign of a notation: the function `find` that detects it, and the message about it."""

    find: Callable[[str], re.Match[str] | None]
    message: str


def _sign(pattern: str, message: str) -> Notation:
    return Notation(re.compile(pattern, re.VERBOSE).search, message)


def _in_capitals(pattern: str, message: str) -> Notation:
    """Finds a sign in capitals, which means nothing in a prompt of capitals only."""
    search = re.compile(pattern).search
    return Notation(lambda text: None if text.isupper() else search(text), message)


# --- lines of a list -------------------------------------------------------------------------------------------

_IMAGE = r"\S+\.(?:png|jpe?g|webp|bmp|tiff?|gif)"
LINES = (
    _sign(r"^\s*(?:\#|//)", "is drawn as a prompt, not a comment; delete it"),
    _sign(
        r"""^\s*(?: "[^"]*"(?:\s*,\s*"[^"]*")* | '[^']*'(?:\s*,\s*'[^']*')* | “[^”]*” ) ,? \s*$""",
        "is drawn with its quotes; leave them out",
    ),
    _sign(r"^\s*(?: [-*•] | \d{1,6}[.):] )\s+\S", "is drawn with its bullet or number; leave it out"),
    _sign(
        r"^(?i:\s*(?:/imagine\s+)?(?:(?:negative|positive)?\s*prompt|negative|positive)\s*:)",
        "is drawn with its label; write only the prompt",
    ),
    _sign(
        r"""^\s*\w+\s*=\s*[\[("'] .* [])"'],? \s*$""", "is drawn as a prompt, but looks like a program's line"
    ),
    _sign(
        r"\S\s*\#{3}\s*\S",
        "is drawn with ###, which begins a negative prompt elsewhere; use --negative_prompt",
    ),
    _sign(
        r"^\s*Steps:\ \d+,\ .*\bSampler:\ ",
        "is drawn as a prompt, but is the settings of an image; replay.py repeats that image",
    ),
    _sign(rf"^\s*(?i:{_IMAGE})(?:\s|[,;:|\#])", "is drawn with the name of a file; write only its caption"),
)


def warn_of_lines(source: str, lines: Iterable[tuple[int, str]]) -> None:
    """Warns of lines, by number, that do not look like prompts but are used as prompts."""
    _warn(LINES, ((f"line {number}", text) for number, text in lines), f"{source}, ")


# --- prompts -----------------------------------------------------------------------------------------------------

_NUMBER = r"[+-]?[.\d]+"
CHOICES = (
    _sign(r"(?<!\\)\{[^{}|]*\|[^{}]*\}", "is read as text; --expand writes out its options"),
    _sign(r"(?<!\\)\$\{\s*[A-Za-z_]\w*\s*[=:}]", "is a variable of dynamic prompts and is read as text"),
    Notation(WILDCARD.search, "is a wildcard, whose file is not read, and is read as text"),
)
WEIGHTS = (
    _sign(
        rf"(?<!\\)\([^()]*:\s*{_NUMBER}\s*\)", "is read as text; --prompt_syntax a1111 reads it as a weight"
    ),
    _sign(
        rf"(?<!\\)\[[^\[\]|]*:\s*{_NUMBER}\s*\] | (?<!\\)\[[^\[\]|]*\|[^\[\]]*\]",
        "is read as text; --prompt_syntax a1111 changes the prompt there during sampling",
    ),
    _sign(
        r"\(\([^()]+\)\) | \[\[[^\[\]]+\]\]", "is read as text; --prompt_syntax a1111 reads it as a weight"
    ),
    _in_capitals(r"\bBREAK\b", "is read as text; --prompt_syntax a1111 reads it as the end of a part"),
    _in_capitals(r"\bAND(?:_[A-Z]+)?\b", "is read as text; --prompt_syntax a1111 joins prompts with AND"),
)
NEGATIVE_WEIGHTS = (
    _in_capitals(r"\bAND\b", "joins prompts, which a negative prompt cannot; it is read as text"),
)
ALWAYS = (
    _sign(
        r"""\)\ *\.\ *(?:blend|and|swap)\( | \w\.swap\(
        | (?:\w|\))[+]{2,}(?=[\s,.)]|$) | \w-{2,}(?=[,)]|$) | \)-{2,}(?=[\s,.)]|$)
        | \([^()]*\)(?:\d+\.\d+|\.\d+|\d+)(?=[\s,]|$)""",
        "is InvokeAI's way of weighing words and is read as text; write (words:1.2) with --prompt_syntax a1111",
    ),
    _sign(
        r"\bembedding:[^\s,()]+",
        "is ComfyUI's name of an embedding and is read as text; write the name that --embedding gives it",
    ),
    _sign(
        r"""(?<![\w<:])(?i:lora|lyco|hypernet)\s*[:：]\s*[\w./-]+ | <(?i:lora|lyco|hypernet|ti):[^<>]*$
        | <(?i:lora|lyco|hypernet|ti)\s*[=：][^<>]*>?""",
        "looks like a tag for a network and is read as text; with --lora_dir, write <lora:NAME:WEIGHT>",
    ),
    _sign(r"/\*", "begins a comment in ComfyUI; here it is read as text"),
    _sign(r"\bwith(?:Lora|Textual\w*)\([^()]*\)", "asks for a network and is read as text; use --lora"),
)
TAGS = (
    _sign(
        r"<(?i:lora|lyco|hypernet|ti)(?::[^<>]*)?>",
        "asks for a network, and without --lora_dir is read as text; that option reads <lora:NAME:WEIGHT>",
    ),
)
OTHER_TAGS = (
    _sign(
        r"<(?!https?:|(?i:lora|lyco|hypernet|ti):)[A-Za-z][\w-]*:[^<>]+>",
        "is not a tag that is known here and is read as text",
    ),
)
NEGATIVE_CHOICES = tuple(
    Notation(sign.find, "is read as text in a negative prompt, with --expand, too") for sign in CHOICES
)
NEGATIVE_TAGS = (
    _sign(
        r"<(?i:lora|lyco|hypernet|ti):[^<>]*>",
        "asks for a network, which a negative prompt cannot; it is read as text. Move it to the prompt",
    ),
)
_SIGNS = re.compile(r"[<(\[{_$*/+:：]|--|[A-Z]{3}")  # all of them have one of these


def warn_of_notations(
    prompts: Iterable[tuple[str, str]],
    negatives: Iterable[tuple[str, str]],
    *,
    expanded: bool,
    weighted: bool,
    tagged: bool,
) -> None:
    """Warns of notations in prompts that mean something in other programs and are text here, once for each.

    Prompts come with the place that a message names. `expanded`, `weighted` and `tagged` are True where --expand,
    the weights of --prompt_syntax a1111 and the tags of --lora_dir are read.
    """
    signs = [*ALWAYS, *(() if weighted else WEIGHTS), *OTHER_TAGS]
    own = [*(() if tagged else TAGS), *(() if expanded else CHOICES), *signs]
    _warn(own, prompts)
    _warn([*NEGATIVE_TAGS, *NEGATIVE_CHOICES, *(NEGATIVE_WEIGHTS if weighted else ()), *signs], negatives)


def _warn(signs: Sequence[Notation], texts: Iterable[tuple[str, str]], before: str = "") -> None:
    """Logs one line for each sign that is found: the first place, the text there, and the count."""
    found: dict[int, list[str]] = {}
    counts = [0] * len(signs)
    for place, text in texts:
        text = text[:MAX_LINE]
        if before or _SIGNS.search(text):
            for i, sign in enumerate(signs):
                if match := sign.find(text):
                    counts[i] += 1
                    found.setdefault(i, [place, match[0].strip() if not before else text.strip()])
                    if before:  # a line has one fault of these
                        break
    for i, (place, what) in sorted(found.items()):
        shown = printable(what if len(what) <= _SHOWN else f"{what[: _SHOWN - 3]}...")
        more = f" ({counts[i]} such {'lines' if before else 'prompts'})" if counts[i] > 1 else ""
        logger.warning("%s%s: %s %s%s", before, place, shown, signs[i].message, more)
