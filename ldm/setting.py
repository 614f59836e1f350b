"""The type and the valid values of a setting: parses it from text, checks it, and describes it in messages."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

from ldm.util import is_list, printable


class Choices(tuple[str, ...]):
    """The choices that are listed, and more values that are valid too."""

    more: Collection[str]

    def __new__(cls, listed: Iterable[str], more: Collection[str]) -> Choices:
        choices = super().__new__(cls, listed)
        choices.more = more
        return choices

    def __contains__(self, value: object) -> bool:
        return super().__contains__(value) or value in self.more


@dataclass(frozen=True, slots=True)
class Setting:
    """One field of a `Job`, or `init.` and one of its `Init`: its type and valid values.

    `low` and `high` are inclusive; of a text without `choices`, and of a tuple with `many`, `high` limits the
    length. A tuple has a setting for each of its entries in `row`; with `many` it is a tuple of such tuples, or if
    `row` has one entry, of its values; `entry` parses one of such tuples from text. `strict` texts have no lone
    surrogates, which UTF-8 cannot hold. `spell` converts other spellings of a choice.
    """

    field: str
    kind: type
    low: float = -math.inf
    high: float = math.inf
    multiple: int = 1
    choices: tuple[str, ...] = ()
    row: tuple[Setting, ...] = ()
    many: bool = False
    optional: bool = False
    strict: bool = True
    spell: Callable[[str], str] = lambda text: "_".join(text.lower().split())
    entry: Callable[[str], tuple[Any, ...]] | None = None

    def parse(self, text: str) -> Any:
        """Parses the value from text. Raises ValueError, with the reason, if it is of another type."""
        if self.entry is not None:
            try:
                return (self.entry(text),)
            except ValueError as error:
                raise ValueError(f"is {shown(text)}: {error}") from None
        try:
            if self.row and not self.many:
                return tuple(part.parse(word) for part, word in zip(self.row, text.split(","), strict=True))
            if self.kind is bool:
                return {"true": True, "false": False}[text.strip().lower()]
            if self.choices:
                return self.spell(text)
            if self.many and len(self.row) == 1:
                return tuple(self.row[0].parse(word) for word in text.split(",") if word.strip())
            return text if self.many else self.kind(text)
        except (ValueError, KeyError):
            raise ValueError(self._refusal(text)) from None

    def check(self, value: Any) -> Any:
        """Returns the value as the job holds it. Raises ValueError, with the reason, for a wrong type or range."""
        if not self.fits(value):
            raise ValueError(self._refusal(value))
        if value is None:
            return None
        if self.many:
            return tuple(map(self.row[0].check if len(self.row) == 1 else self._as_row, value))
        return self._as_row(value) if self.row else self.kind(value)

    def _as_row(self, value: Any) -> tuple[Any, ...]:
        return tuple(part.check(entry) for part, entry in zip(self.row, value, strict=True))

    def read(self, text: str) -> Any:
        """Parses and checks a value."""
        return self.check(self.parse(text))

    def fits(self, value: Any) -> bool:
        """Returns whether the field can have the value."""
        if value is None:
            return self.optional
        if self.many:
            few = is_list(value) and len(value) <= self.high
            return few and all(map(self.row[0].fits if len(self.row) == 1 else self._fits_row, value))
        if self.row:
            return self._fits_row(value)
        if self.kind is str:
            return isinstance(value, str) and self._fits_text(value)
        if self.kind is bool or isinstance(value, bool):
            return self.kind is bool and isinstance(value, bool)
        if not isinstance(value, int | float if self.kind is float else int):
            return False
        in_range = _is_finite(value) and self.low <= value <= self.high
        return in_range and (self.multiple == 1 or value % self.multiple == 0)

    def _fits_text(self, value: str) -> bool:
        if self.choices:
            return value in self.choices
        return len(value) <= self.high and (not self.strict or _is_text(value))

    def _fits_row(self, value: Any) -> bool:
        if not is_list(value) or len(value) != len(self.row):
            return False
        return all(part.fits(entry) for part, entry in zip(self.row, value, strict=True))

    def _refusal(self, value: Any) -> str:
        one = self.row and not self.many and is_list(value) and isinstance(value, tuple)
        return f"is {shown(','.join(map(str, value)) if one else value)}; give {self.wanted()}"

    def wanted(self) -> str:
        """Describes in words the values that the field can have."""
        if self.row:
            each = [part.wanted() for part in self.row]
            if not self.many and len(set(each)) == 1:
                return f"{len(each)} values, each {each[0]}"
            entries = ", ".join(each)
            if len(each) == 1:
                return f"up to {self.high:g} values, each {entries}"
            return f"a list of [{entries}]" if self.many else entries
        if self.choices:
            return " or ".join([", ".join(self.choices[:-1]), self.choices[-1]])
        if self.kind is bool:
            return "true or false"
        if self.kind is str:
            return "valid text" if math.isinf(self.high) else f"valid text of up to {self.high:,} characters"
        number = "a number" if self.kind is float else "a whole number"
        if self.multiple > 1:
            number = f"a multiple of {self.multiple}"
        if math.isinf(self.high):
            return "a finite number" if math.isinf(self.low) else f"{number} of {self.low:g} or more"
        low, high = (str(end) if isinstance(end, int) else f"{end:.10g}" for end in (self.low, self.high))
        return f"{number} from {low} to {high}"


def shown(value: Any) -> str:
    """Formats a value for a message: printable, and short."""
    text = value if isinstance(value, str) else _repr(value)
    return printable(text[:80]) or "empty"


def _repr(value: Any) -> str:
    try:
        return repr(value)
    except ValueError:  # a whole number of more digits than Python writes out
        return "a very large number"


def _is_text(value: str) -> bool:
    """Returns whether UTF-8 can hold the text: lone surrogates can come out of JSON."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float can hold
        return False
