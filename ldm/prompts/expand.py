"""Many jobs from few words: {a|b|c} in prompts, and sweeps over settings."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal, InvalidOperation
from math import prod
from typing import Any

from ldm.fields import Setting, find_setting
from ldm.prompts.files import Faults
from ldm.prompts.lines import Line
from ldm.util import InputError, printable

MAX_JOBS = 10_000
_MAX_DEPTH = 50

# --- {a|b|c} ------------------------------------------------------------------------------------------------

Options = list["Template"]  # what stands between the braces of a group
Template = list["str | Options"]  # texts and groups, one after another

_PIECE = re.compile(r"\\.|[{|}]|[^\\{|}]+|\\", re.DOTALL)


def expand_lines(lines: Sequence[Line], faults: Faults, cap: int = MAX_JOBS) -> list[Line]:
    """Lines with every `{a|b|c}` of their prompts written out, see `expand`; at most `cap` more than they were.

    What is wrong with the lines goes to `faults`. Raises InputError for more lines than that.
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
    """Every combination of the options in braces, the first group changing slowest.

    Options can be empty and hold groups. Braces without a bar, and bars outside braces, are text; so is a
    backslash with one of {|} behind it, without the backslash. `InputError` for braces that do not match, and
    for more than `cap` combinations.
    """
    pieces = _PIECE.findall(prompt)
    parsed, rest = _parse(pieces, 0)
    if rest < len(pieces):
        raise InputError("a } closes nothing in the prompt; write \\} for a literal one")
    count = _count(parsed)
    if count > cap:
        raise _too_many("the prompt", count, cap)
    return list(_texts(parsed))


def _too_many(what: str, count: int, cap: int) -> InputError:
    number = str(count) if count < 10**15 else "more than 10^15"
    return InputError(f"{what} would give {number} prompts; use fewer options, at most {cap}")


def _parse(pieces: Sequence[str], at: int, depth: int = 0) -> tuple[Template, int]:
    """The sequence that begins at a piece, and the piece that ends it: a bar or a brace, or none."""
    sequence: Template = []
    while at < len(pieces):
        piece = pieces[at]
        if piece == "}" or (piece == "|" and depth):
            break
        if piece == "{":
            group, at = _parse_group(pieces, at + 1, depth + 1)
            sequence += group
        else:
            sequence.append(piece[1:] if piece in ("\\{", "\\|", "\\}") else piece)
        at += 1
    return sequence, at


def _parse_group(pieces: Sequence[str], at: int, depth: int) -> tuple[Template, int]:
    """A group from behind its opening brace to its closing one; without a bar its braces are text."""
    if depth > _MAX_DEPTH:
        raise InputError(f"the prompt has more than {_MAX_DEPTH} braces in one another; use fewer")
    options: Options = []
    while True:
        option, at = _parse(pieces, at, depth)
        options.append(option)
        if at >= len(pieces):
            raise InputError("a { is not closed in the prompt; write \\{ for a literal one")
        if pieces[at] == "}":
            return ([options] if len(options) > 1 else ["{", *option, "}"]), at
        at += 1


def _count(sequence: Template) -> int:
    return prod(sum(map(_count, part)) for part in sequence if not isinstance(part, str))


def _texts(sequence: Template) -> Iterator[str]:
    choices = [
        [part] if isinstance(part, str) else [text for option in part for text in _texts(option)]
        for part in sequence
    ]
    return map("".join, itertools.product(*choices))


# --- sweeps -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Axis:
    """A setting by the name it was given, its field of `Job`, and the values it takes."""

    name: str
    field: str
    values: tuple[Any, ...]

    @property
    def labels(self) -> list[str]:
        """A caption for each value, such as `scale=7.5`."""
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
        """The captions of a sheet's rows; one empty caption where there is a single axis."""
        return self.axes[0].labels if len(self.axes) > 1 else [""]

    @property
    def columns(self) -> list[str]:
        """The captions of a sheet's columns."""
        return self.axes[min(1, len(self.axes) - 1)].labels

    @property
    def sheets(self) -> list[str]:
        """The captions of the sheets; one empty caption where two axes say everything."""
        return list(map(", ".join, itertools.product(*(axis.labels for axis in self.axes[2:]))))

    def overrides(self) -> Iterator[dict[str, Any]]:
        """What each job changes, by field: sheet by sheet, row by row, column by column."""
        axes = [*self.axes[2:], *self.axes[:2]]
        for values in itertools.product(*(axis.values for axis in axes)):
            yield {axis.field: value for axis, value in zip(axes, values, strict=True)}


def parse_sweep(texts: Sequence[str], cap: int = MAX_JOBS) -> Sweep:
    r"""A sweep from texts such as `scale=5,7.5,10`, `steps=10..50:10` and `prompt=a cat,a dog`.

    A name is a field of `Job`, `init.` and one of its picture's, or the command line's. Ranges include both ends
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
    """What stands between commas, escaped ones aside."""
    return [part.replace("\\,", ",") for part in _COMMA.split(text)]


def _spread(entry: str, setting: Setting, cap: int) -> list[str]:
    """The values of a range, as texts; any other entry alone."""
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
    """From first to last, in decimal numbers so that steps of 0.1 stay exact."""
    if step <= 0:
        raise InvalidOperation
    steps = abs(last - first) / step
    if steps >= cap:
        raise ValueError(f"has a range of more than {cap} values; use a larger step")
    return [first + i * (step if last >= first else -step) for i in range(int(steps) + 1)]
