"""Expands {a|b|c} in prompts and sweeps over settings into many jobs."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal, InvalidOperation
from math import factorial, prod
from typing import Any

from ldm.fields import find_setting
from ldm.prompts.files import Faults
from ldm.prompts.lines import Line
from ldm.setting import Setting
from ldm.util import InputError, printable

MAX_JOBS = 10_000
_MAX_DEPTH = 50

# --- {a|b|c} ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Group:
    """A group's options, how many of them are combined at once, and their separator."""

    options: list[Template]
    low: int = 1
    high: int = 1
    separator: str = ","


Template = list["str | _Group"]  # texts and groups, one after another

_PIECE = re.compile(r"\\__|\\.|[{|}]|[^\\{|}]+|\\", re.DOTALL)
_ESCAPES = ("\\{", "\\|", "\\}", "\\__")
_COUNT = re.compile(
    r"\s* (?: e | (?=[\d-]) (\d*) \s* (-?) \s* (\d*) ) \s* \$\$ (?: (.*?) \$\$ )?", re.DOTALL | re.VERBOSE
)
_WEIGHT = re.compile(r"\s*(?:[0-9]+\.?[0-9]*|\.[0-9]+)::")
_SAMPLER = re.compile(r"([~@!])(?=.)", re.DOTALL)
_VARIABLE = re.compile(r"(?<!\\)\$\{\s*[A-Za-z_]\w*\s*[=:}]")
WILDCARD = re.compile(r"(?<!\\)__[~@!]?(?:[^\W_]|\*)[\w*/., ()=-]{0,99}?__")
_MOST_AT_ONCE = 20  # 21 options have more orders than any cap


def expand_lines(lines: Sequence[Line], faults: Faults, cap: int = MAX_JOBS) -> list[Line]:
    """Expands every `{a|b|c}` in the prompts of lines, see `expand`, into at most `cap` additional lines.

    Errors in the lines are added to `faults`. Raises InputError for more lines than that.
    """
    expanded: list[Line] = []
    for done, line in enumerate(lines, 1):
        try:
            expanded += [replace(line, prompt=prompt) for prompt in expand(line.prompt, cap)]
        except InputError as error:
            faults.add(line.number, str(error))
        if len(expanded) > cap + done:
            raise _too_many(f"the lines up to {line.number}", len(expanded), cap + done)
    return expanded


def expand(prompt: str, cap: int = MAX_JOBS) -> list[str]:
    """Returns every combination of the options in braces, the first group changing slowest.

    Options can be empty and contain groups. Braces without a bar, and bars outside braces, are text; so is a
    backslash before one of {|} or before two underscores, without the backslash. As the package dynamicprompts
    does, `{2$$a|b|c}` combines two of the options in every order, `{1-2$$ and $$a|b}` one or two with " and "
    between them, and a weight (`{0.5::a|b}`) has no effect where every option is used.

    `InputError` for braces that do not match, for more than `cap` combinations, and for dynamicprompts'
    wildcards (`__colour__`), variables (`${x=...}`) and random choices (`{~a|b}`).
    """
    _refuse_unsupported(prompt)
    pieces = _PIECE.findall(prompt)
    parsed, rest = _parse(pieces, 0)
    if rest < len(pieces):
        raise InputError("a } closes nothing in the prompt; write \\} for a literal one")
    count = _count(parsed)
    if count > cap:
        raise _too_many("the prompt", count, cap)
    return list(_texts(parsed))


def _refuse_unsupported(prompt: str) -> None:
    if wildcard := WILDCARD.search(prompt):
        shown = printable(wildcard[0])
        raise InputError(
            f"{shown} is a wildcard, whose file is not read; write its options as {{a|b}}, or \\{shown} for that text"
        )
    if variable := _VARIABLE.search(prompt):
        raise InputError(
            f"{printable(variable[0])[:80]} is a variable of dynamic prompts, which is not supported; write its "
            "value (\\{ and \\} are literal braces)"
        )


def _too_many(what: str, count: int, cap: int) -> InputError:
    number = str(count) if count < 10**15 else "more than 10^15"
    return InputError(f"{what} would give {number} prompts; use fewer options, at most {cap}")


def _parse(pieces: Sequence[str], at: int, depth: int = 0) -> tuple[Template, int]:
    """Returns the sequence that begins at a piece, and the piece that ends it: a bar or a brace, or none."""
    sequence: Template = []
    while at < len(pieces):
        piece = pieces[at]
        if piece == "}" or (piece == "|" and depth):
            break
        if piece == "{":
            group, at = _parse_group(pieces, at + 1, depth + 1)
            sequence += group
        else:
            sequence.append(piece[1:] if piece in _ESCAPES else piece)
        at += 1
    return sequence, at


def _parse_group(pieces: Sequence[str], at: int, depth: int) -> tuple[Template, int]:
    """Parses a group after its opening brace; without a bar, count or weight its braces are text."""
    if depth > _MAX_DEPTH:
        raise InputError(f"the prompt has more than {_MAX_DEPTH} braces in one another; use fewer")
    options: list[Template] = []
    while True:
        option, at = _parse(pieces, at, depth)
        options.append(option)
        if at >= len(pieces):
            raise InputError("a { is not closed in the prompt; write \\{ for a literal one")
        if pieces[at] == "}":
            return _group(options), at
        at += 1


def _group(options: list[Template]) -> Template:
    """Parses the content of braces: its count and separator, and its options without their weights."""
    text, rest = _leading_text(options[0])
    counted = _COUNT.match(text)
    if counted is None and len(options) > 1 and "$$" in text:
        raise InputError(
            f"{{{printable(text)[:80]} does not say how many of the options to take; "
            "write {2$$a|b|c} or {1-2$$a|b}"
        )
    weighted = any(_WEIGHT.match(_leading_text(option)[0]) for option in options)
    if counted is None and not weighted and len(options) == 1:
        return ["{", *options[0], "}"]
    if counted:
        text = text[counted.end() :]
    elif sampler := _SAMPLER.match(text):
        if sampler[1] != "!":  # that one means every combination
            raise InputError(
                f"{{{printable(text)[:80]} chooses at random or in turn, which --expand does not do; "
                f"leave the {sampler[1]} out"
            )
        text = text[1:]
    options = [_without_weight(option) for option in ([text, *rest], *options[1:])]
    return [_Group(options, *_bounds(counted, len(options)))]


def _leading_text(option: Template) -> tuple[str, Template]:
    """Returns the text with which an option begins, and the rest."""
    texts = list(itertools.takewhile(lambda part: isinstance(part, str), option))
    return "".join(map(str, texts)), option[len(texts) :]


def _without_weight(option: Template) -> Template:
    text, rest = _leading_text(option)
    return [_WEIGHT.sub("", text, count=1) if _WEIGHT.match(text) else text, *rest]


def _bounds(counted: re.Match[str] | None, most: int) -> tuple[int, int, str]:
    """Returns the minimum and the maximum of options at once, of `most`, and the separator."""
    if counted is None:
        return 1, 1, ","
    low, to, high, separator = counted.groups()
    if low is None:  # kohya's {e$$a|b}: each of them
        return 1, 1, ","
    ends = sorted(min(int(end[:9] or usual), most) for end, usual in ((low, 1), (high if to else low, most)))
    return ends[0], ends[1], "," if separator is None else separator


def _count(sequence: Template) -> int:
    return prod(_ways(part) for part in sequence if not isinstance(part, str))


def _ways(group: _Group) -> int:
    """Counts a group's texts: k! times the k-th elementary symmetric polynomial of its options' counts."""
    most = min(group.high, _MOST_AT_ONCE)
    sums = [1] + [0] * most
    for ways in map(_count, group.options):
        for k in range(most, 0, -1):
            sums[k] += sums[k - 1] * ways
    beyond = factorial(_MOST_AT_ONCE + 1) if group.high > most else 0
    return sum(factorial(k) * sums[k] for k in range(group.low, most + 1)) + beyond


def _texts(sequence: Template) -> Iterator[str]:
    choices = [[part] if isinstance(part, str) else list(_group_texts(part)) for part in sequence]
    return map("".join, itertools.product(*choices))


def _group_texts(group: _Group) -> Iterator[str]:
    texts = [list(_texts(option)) for option in group.options]
    for count in range(group.low, group.high + 1):
        for taken in itertools.permutations(texts, count):
            yield from map(group.separator.join, itertools.product(*taken))


# --- sweeps -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Axis:
    """A setting: the name that the user gave, its field of `Job`, and its values."""

    name: str
    field: str
    values: tuple[Any, ...]

    @property
    def labels(self) -> list[str]:
        """Returns a caption for each value, such as `scale=7.5`."""
        return [f"{self.name}={_shown(value)}" for value in self.values]


def _shown(value: Any) -> str:
    return repr(value).removesuffix(".0") if isinstance(value, float) else printable(value)


@dataclass(frozen=True, slots=True)
class Sweep:
    """All combinations of the axes' values: the first axis gives a sheet's rows, the second its columns.

    A single axis is one row. Further axes make further sheets.
    """

    axes: tuple[Axis, ...]

    @property
    def rows(self) -> list[str]:
        """Returns the captions of a sheet's rows; one empty caption if there is a single axis."""
        return self.axes[0].labels if len(self.axes) > 1 else [""]

    @property
    def columns(self) -> list[str]:
        """Returns the captions of a sheet's columns."""
        return self.axes[min(1, len(self.axes) - 1)].labels

    @property
    def sheets(self) -> list[str]:
        """Returns the captions of the sheets; one empty caption if there are at most two axes."""
        return list(map(", ".join, itertools.product(*(axis.labels for axis in self.axes[2:]))))

    def overrides(self) -> Iterator[dict[str, Any]]:
        """Yields the values that each job changes, by field: sheet by sheet, row by row, column by column."""
        axes = [*self.axes[2:], *self.axes[:2]]
        for values in itertools.product(*(axis.values for axis in axes)):
            yield {axis.field: value for axis, value in zip(axes, values, strict=True)}


def parse_sweep(texts: Sequence[str], cap: int = MAX_JOBS) -> Sweep:
    r"""Parses a sweep from texts such as `scale=5,7.5,10`, `steps=10..50:10` and `prompt=a cat,a dog`.

    A name is a field of `Job`, `init.` and a field of `Init`, or an option's. Ranges include both ends
    and go down if the first is larger; their step is 1 if none is given. `\,` is a comma within a value.
    `InputError` for an unknown name, one given twice, a wrong value, and more than `cap` combinations.
    """
    axes = tuple(_axis(text, cap) for text in texts)
    if not axes:
        raise InputError("a sweep needs a setting and its values, such as scale=5,7.5,10")
    given = [axis.field for axis in axes]
    for axis in axes:
        if given.count(axis.field) > 1:
            raise InputError(f"--sweep {axis.name} is given twice; put all values into one")
    count = prod(len(axis.values) for axis in axes)
    if count > cap:
        raise InputError(f"--sweep would give {count} combinations; use fewer values, at most {cap}")
    return Sweep(axes)


def _axis(text: str, cap: int) -> Axis:
    name, equals, values = text.partition("=")
    name = name.strip()
    setting = find_setting(name)
    if setting is None or not equals:
        raise InputError(f"--sweep {printable(text)[:80]} names no setting; write one such as scale=5,7.5,10")
    if setting.row:
        raise InputError(f"--sweep {name}: its values hold commas, so it cannot be swept")
    try:
        read = [setting.read(part) for entry in _entries(values) for part in _spread(entry, setting, cap)]
    except ValueError as error:
        raise InputError(f"--sweep {name} {error}") from None
    if len(set(read)) < len(read):
        raise InputError(f"--sweep {name} has a value twice; leave one out")
    return Axis(name, setting.field, tuple(read))


_COMMA = re.compile(r"(?<!\\),")
_RANGE = re.compile(r"(.+?)\.\.(.+?)(?::(.+))?")


def _entries(text: str) -> list[str]:
    """Splits at commas that are not escaped."""
    return [part.replace("\\,", ",") for part in _COMMA.split(text)]


def _spread(entry: str, setting: Setting, cap: int) -> list[str]:
    """Returns the values of a range, as texts; any other entry alone."""
    match = _RANGE.fullmatch(entry.strip())
    if match is None or setting.kind not in (int, float):
        return [entry]
    try:
        first, last, step = (Decimal(part or 1) for part in match.groups())
        return [f"{value:f}" for value in _range(first, last, step, cap)]
    except ArithmeticError:
        shown = printable(entry.strip())[:80]
        raise ValueError(f"is {shown}; write a range such as 10..50:10, with a step above 0") from None


def _range(first: Decimal, last: Decimal, step: Decimal, cap: int) -> list[Decimal]:
    """Returns the numbers from first to last, in decimal so that steps of 0.1 are exact."""
    if step <= 0:
        raise InvalidOperation
    steps = abs(last - first) / step
    if steps >= cap:
        raise ValueError(f"has a range of more than {cap} values; use a larger step")
    return [first + i * (step if last >= first else -step) for i in range(int(steps) + 1)]
