"""One line of a prompt list, and the collection and check of its values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

from ldm.fields import SETTINGS
from ldm.prompts.files import MAX_LINE, Faults, too_long
from ldm.setting import Setting
from ldm.util import printable

COUNT, SEEDS = "count", "seeds"  # in addition to the fields of a job: how many images, and several seeds
MAX_COUNT = 100_000
_COUNT = Setting(COUNT, int, 1, MAX_COUNT)
_NO_OVERRIDES: Mapping[str, Any] = {}


@dataclass(frozen=True, slots=True)
class Line:
    """The request of one line: `count` images of a prompt for each of its seeds.

    `seeds` is empty where the run chooses the seed; a seed is that of the first of its images, and the next
    ones count up. `overrides` are checked values by field of `Job`, after `init.` by field of its `Init`; `init`
    None removes the image. `number` counts the source's lines from 1.
    """

    number: int
    prompt: str
    seeds: tuple[int, ...] = ()
    count: int = 1
    overrides: Mapping[str, Any] = field(default_factory=lambda: _NO_OVERRIDES)


def numbered(lines: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Yields the lines that are not blank, with their numbers."""
    return ((i, text) for i, text in enumerate(lines, 1) if text and not text.isspace())


def parse_field(field: str, text: str) -> Any:
    """Parses a text as a value of a field's type. Raises ValueError with the reason."""
    if field == SEEDS:
        return tuple(map(SETTINGS["seed"].parse, text.split(",")))
    return _setting(field).parse(text)


def check_field(field: str, value: Any) -> Any:
    """Returns the value as a job holds it. Raises ValueError for a wrong type or range, with the reason."""
    if field == SEEDS:
        return tuple(map(SETTINGS["seed"].check, value))
    return _setting(field).check(value)


def check_value(field: str, value: Any) -> Any:
    """Does the same as `check_field`, but accepts the spellings of choices that a line may use."""
    spelt = isinstance(value, str) and field != SEEDS and (_setting(field).choices or _setting(field).entry)
    return check_field(field, parse_field(field, value) if spelt else value)


def is_number(field: str) -> bool:
    """Returns whether the values of a field are numbers."""
    return field == SEEDS or _setting(field).kind in (int, float)


def _setting(field: str) -> Setting:
    return _COUNT if field == COUNT else SETTINGS[field]


class Values:
    """Collects the values of one line, and its faults."""

    def __init__(self, number: int, faults: Faults) -> None:
        self._number, self._faults = number, faults
        self._good = True
        self._values: dict[str, Any] = {}
        self._counts: dict[str, int] = {}

    def fault(self, what: str) -> None:
        """Adds a fault of the line."""
        self._good = False
        self._faults.add(self._number, what)

    def add(self, name: str, field: str, read: Callable[[], Any]) -> None:
        """Adds the value that `read` returns for a field, under its name in the line."""
        try:
            value = read()
        except ValueError as error:
            self.fault(f"{printable(name)} {error}")
            return
        target: dict[str, Any] = self._counts if field == COUNT else self._values
        key = name if field == COUNT else field
        if key in target and key in SETTINGS and SETTINGS[key].entry is not None:
            value = (*target[key], *value)
        elif key in target:
            self.fault(f"{printable(name)} is given twice; leave one out")
        target[key] = value

    def add_text(self, name: str, field: str, text: str) -> None:
        """Adds the value of a text."""
        self.add(name, field, lambda: check_field(field, parse_field(field, text)))

    def line(self) -> Line | None:
        """Returns the line, or None if it has a fault."""
        values, count = self._values, prod(self._counts.values())
        if count > MAX_COUNT:
            self.fault(f"{count} images of one line; give at most {MAX_COUNT}")
        for name in ("prompt", "negative_prompt"):
            if len(values.get(name) or "") > MAX_LINE:
                self.fault(f"{name} is {too_long()}")
        if self._good and "prompt" not in values:
            self.fault("has no prompt; write one")
        if not self._good:
            return None
        seeds = (values.pop("seed"),) if "seed" in values else values.pop(SEEDS, ())
        return Line(self._number, values.pop("prompt"), seeds, count, values or _NO_OVERRIDES)
