"""Reads lines with options, in the dialects of several programs."""

from __future__ import annotations

import logging
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ldm.fields import FIELDS
from ldm.prompts.files import Faults
from ldm.prompts.lines import COUNT, SEEDS, Line, Values, is_number, numbered, parse_field
from ldm.prompts.notations import warn_of_lines
from ldm.util import printable

logger = logging.getLogger(__name__)


class _Parts(NamedTuple):
    """A parsed line: the text before its options, their names and values, and the part that could not be parsed."""

    text: str
    options: list[tuple[str, str | None]]
    fault: str = ""


@dataclass(frozen=True)
class Dialect:
    """A dialect of options: how a line is split, and the meaning of its options.

    `names` maps an option, dashes included, to a field of `Job`, to `count` or `seeds`, or to None if it has no
    counterpart here. `flags` take no value; they set a field to one. `comments` begin lines that are skipped.
    """

    name: str
    title: str
    split: Callable[[str], _Parts]
    names: Mapping[str, str | None]
    flags: Mapping[str, tuple[str, Any]]
    dashes: str = "--"  # the fewest before a name
    comments: tuple[str, ...] = ()
    brackets: bool = False  # [words] in the prompt are the negative prompt

    def read(self, lines: Sequence[str], faults: Faults) -> Iterator[Line]:
        """Reads every line as one of this dialect."""
        return filter(None, (self._line(*numbered, faults) for numbered in self._used(lines)))

    def read_mixed(self, lines: Sequence[str], faults: Faults) -> Iterator[Line]:
        """Reads the lines of this dialect by its rules, the others literally."""
        literal: list[tuple[int, str]] = []
        for number, text in self._used(lines):
            names = [name for name in option_names(text) if name.startswith(self.dashes)]
            if names and not self._is_own(text, names):
                literal.append((number, names[0]))
                yield Line(number, text)
            elif line := self._line(number, text, faults):
                yield line
        warn_of_literal(faults.name, literal)
        if not self.brackets:  # there quotes belong to the dialect
            warn_of_lines(faults.name, (line for line in self._used(lines) if not option_names(line[1])))

    def _used(self, lines: Sequence[str]) -> Iterator[tuple[int, str]]:
        return (
            (number, text)
            for number, text in numbered(lines)
            if not (self.comments and text.lstrip().startswith(self.comments))
        )

    def is_evidence(self, text: str, names: Sequence[str]) -> bool:
        """Returns whether all of a line, with options of these names in it, reads as this dialect."""
        if not any(map(self._may_know, names)):
            return False
        parts = self.split(text)
        prompt_is_option = any(name == "--prompt" for name, _ in parts.options)
        return (
            not parts.fault
            and bool(parts.text) != prompt_is_option
            and all(self._has_type(*option) for option in parts.options)
            and any(self._tells(*option) for option in parts.options)
        )

    def _knows(self, name: str) -> bool:
        return name in self.names or name in self.flags

    def _may_know(self, name: str) -> bool:
        """Returns whether an apparent option can be one: known, or a known letter with its value attached."""
        return self._knows_long(name) or (name[1] != "-" and self._knows(name[:2]))

    def _knows_long(self, name: str) -> bool:
        return name.startswith("--") and (self._knows(name) or self._knows(name.lower()))

    def _is_own(self, text: str, names: Sequence[str]) -> bool:
        if any(map(self._knows_long, names)):
            return True
        return any(map(self._may_know, names)) and any(
            self._tells(*option) for option in self.split(text).options
        )

    def _tells(self, name: str, value: str | None) -> bool:
        """Returns whether an option is unlikely to be chance: a long name, or a letter with a number."""
        field = self.names.get(name)
        if name.startswith("--"):
            return name in self.flags or field is not None
        return field is not None and is_number(field) and self._has_type(name, value)

    def _has_type(self, name: str, value: str | None) -> bool:
        if not self._knows(name):
            return False
        field = self.names.get(name)
        if field is None:  # a flag, or an option without a counterpart
            return value is None or name not in self.flags
        return value is not None and _is_of_type(field, value)

    def _line(self, number: int, text: str, faults: Faults) -> Line | None:
        parts = self.split(text)
        values = Values(number, faults)
        if parts.fault:
            values.fault(parts.fault)
            return values.line()
        if parts.text:
            self._add_prompt(values, parts.text)
        for name, value in parts.options:
            self._add(values, name, value)
        return values.line()

    def _add_prompt(self, values: Values, prompt: str) -> None:
        if self.brackets and (negative := _BRACKETS.findall(prompt)):
            values.add("[...]", "negative_prompt", lambda: " ".join(negative))
            prompt = re.sub(" +", " ", _BRACKETS.sub(" ", prompt)).strip()
        values.add_text("--prompt", "prompt", prompt)

    def _add(self, values: Values, name: str, value: str | None) -> None:
        field = self.names.get(name)
        if not self._knows(name):
            values.fault(
                f"{printable(name)[:80]} is not an option of {self.title}, which has {self._supported()}"
            )
        elif name in self.flags and value is not None:
            values.fault(f"{name} takes no value, so {printable(value)[:80]} is too much")
        elif name in self.flags:
            field, constant = self.flags[name]
            values.add(name, field, lambda: constant)
        elif field is None:
            if value != "false":  # an option that is off anyway
                values.fault(f"{name} has no counterpart here; leave it out")
        elif value is None:
            values.fault(f"{name} needs a value")
        elif field == "prompt":
            self._add_prompt(values, value)
        else:
            values.add_text(name, field, value)

    def _supported(self) -> str:
        return ", ".join([*(name for name, field in self.names.items() if field is not None), *self.flags])


def _is_of_type(field: str, text: str) -> bool:
    try:
        parse_field(field, text)
    except ValueError:
        return False
    return True


_BRACKETS = re.compile(r"\[(.*?)\]")
_GAP = r"(?:^|[ \t])"  # the white space that shells and the other programs split at
_OPTION = re.compile(_GAP + r"(--?[A-Za-z][\w-]*)")


def option_names(text: str) -> list[str]:
    """Returns apparent names of options: dashes and a letter after white space, or at the beginning."""
    return _OPTION.findall(text) if "-" in text else []


def warn_of_literal(source: str, literal: Sequence[tuple[int, str]]) -> None:
    """Warns of lines, by number and an option in each, that are read literally."""
    if literal:
        number, name = literal[0]
        logger.warning(
            "%s: what looks like an option is read as a part of the prompt in %d line%s, first %s in line %d; "
            "--prompt_format sets how the file is read",
            source, len(literal), "s" if len(literal) > 1 else "", printable(name)[:80], number,
        )  # fmt: skip


def _shell_words(text: str, comments: bool = False) -> list[str]:
    """Splits a shell line into words. Raises ValueError for a quote that is not closed."""
    if not any(sign in text for sign in "\"'\\#"):  # shlex is slow
        return re.findall(r"[^ \t]+", text)
    return shlex.split(text, comments=comments)


_NO_CLOSING_QUOTE = "a quote does not close; write \\\" or \\' for a literal one"


def _split_long(text: str) -> _Parts:
    """Splits text, then `--name words` or `--name=word`, quoted as in a shell; the text itself is literal."""
    first = re.search(_GAP + "--[A-Za-z]", text)
    if first is None:
        return _Parts(text, [])
    try:
        words = _shell_words(text[first.start() :])
    except ValueError:
        return _Parts("", [], _NO_CLOSING_QUOTE)
    options: list[tuple[str, str | None]] = []
    for word in words:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            options.append((name, value if equals else None))
        else:
            name, value = options[-1]
            options[-1] = name, word if value is None else f"{value} {word}"
    return _Parts(text[: first.start()].strip(), options)


def _split_a1111(text: str) -> _Parts:
    parts = _split_long(text)
    if parts.text and parts.options:
        return _Parts(
            "", [], f"there is text before {printable(parts.options[0][0])[:80]}; put --prompt before it"
        )
    return parts


def _split_kohya(text: str) -> _Parts:
    """Splits text, then `--letter value` up to the next such; nothing is quoted, letters in either case."""
    prompt, *options = re.split(_GAP + "--(?=[A-Za-z])", text)
    parts = [option.split(maxsplit=1) for option in options]
    return _Parts(
        prompt.strip(), [(f"--{p[0].lower()}", p[1].strip() if len(p) > 1 else None) for p in parts]
    )


_SWITCH = re.compile(_GAP + "--?[A-Za-z]")


def _split_invokeai(text: str) -> _Parts:
    """Splits a prompt, literal or in double quotes, then `-Xvalue`, `-X value`, `--name value` or `--name=value`."""
    text = text.strip()
    try:
        if text.startswith('"'):
            prompt, *words = _shell_words(text, comments=True)
        else:
            first = _SWITCH.search(text)
            prompt = text[: first.start()].strip() if first else text
            words = _shell_words(text[first.start() :], comments=True) if first else []
    except ValueError:
        return _Parts("", [], _NO_CLOSING_QUOTE)
    options: list[tuple[str, str | None]] = []
    for word in words:
        if _SWITCH.match(word):
            options.append(_switch(word))
        elif options and options[-1][1] is None:
            options[-1] = options[-1][0], word
        else:
            return _Parts("", [], f"{printable(word)[:80]} is after the options; put it into the prompt")
    return _Parts(prompt, options)


def _switch(word: str) -> tuple[str, str | None]:
    """Returns name and attached value of a word that begins with a dash."""
    if word.startswith("--"):
        name, equals, value = word.partition("=")
        return name, value if equals else None
    if word in _INVOKEAI:
        return word, None
    return word[:2], word[2:].removeprefix("=") or None


def _dashed(names: Mapping[str, str | None] | str, dashes: str = "--") -> dict[str, str | None]:
    """Returns options with their dashes; from a text, options without a counterpart."""
    pairs = dict.fromkeys(names.split()) if isinstance(names, str) else names
    return {dashes + name: field for name, field in pairs.items()}


_A1111 = _dashed(
    {
        "prompt": "prompt",
        "negative_prompt": "negative_prompt",
        "seed": "seed",
        "steps": "steps",
        "cfg_scale": "scale",
        "width": "width",
        "height": "height",
        "sampler_name": "sampler",
        "n_iter": COUNT,
        "batch_size": COUNT,
        "subseed": "variation_seed",
        "subseed_strength": "variation_strength",
    }
) | _dashed(
    "sd_model outpath_samples outpath_grids prompt_for_display styles seed_resize_from_h "
    "seed_resize_from_w sampler_index restore_faces tiling do_not_save_samples do_not_save_grid"
)
_KOHYA = _dashed(
    {
        "n": "negative_prompt",
        "w": "width",
        "h": "height",
        "s": "steps",
        "d": SEEDS,
        "l": "scale",
        "t": "strength",
        "ss": "sampler",
    }
) | _dashed("nl c am f")
_INVOKEAI = (
    _dashed(
        {
            "n": COUNT,
            "s": "steps",
            "S": "seed",
            "W": "width",
            "H": "height",
            "C": "scale",
            "A": "sampler",
            "m": "sampler",
            "I": "init.image",
            "f": "strength",
        },
        "-",
    )
    | _dashed(
        {
            "prompt": "prompt",
            "iterations": COUNT,
            "steps": "steps",
            "seed": "seed",
            "width": "width",
            "height": "height",
            "cfg_scale": "scale",
            "sampler": "sampler",
            "init_img": "init.image",
            "strength": "strength",
        }
    )
    | _dashed("M F T g i x t o z r c v V U G tm ft cf fit", "-")
    | _dashed(
        "init_mask grid outdir variation_amount with_variations upscale facetool_strength text_mask fit"
    )
)
_OWN = [row for row in FIELDS if not row.of_run]
_OPTIONS = _dashed(
    {name: row.name for row in _OWN if row.option for name in (row.option, row.dest)}
    | {"n_iter": COUNT, "n_samples": COUNT}
)
_FLAGS: Mapping[str, tuple[str, Any]] = {
    f"--{switch.option}": (row.name, switch.value) for row in _OWN for switch in row.switches
}
DIALECTS = (
    Dialect("options", "this tool's options for a line", _split_long, _OPTIONS, _FLAGS),
    Dialect("a1111", "AUTOMATIC1111's dialect", _split_a1111, _A1111, {}),
    Dialect("kohya", "kohya's dialect", _split_kohya, _KOHYA, {}, comments=("#",)),
    Dialect(
        "invokeai",
        "InvokeAI's dialect",
        _split_invokeai,
        _INVOKEAI,
        {},
        dashes="-",
        comments=("#", "//"),
        brackets=True,
    ),
)
