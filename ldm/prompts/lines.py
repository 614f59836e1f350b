"""What one line of a prompt list asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

from ldm.fields import SETTINGS, Setting
from ldm.prompts.files import MAX_LINE, Faults, too_long
from ldm.util import printable

COUNT, SEEDS = "count", "seeds"  # beside the fields of a job: how many images, and several seeds
MAX_COUNT = 100_000
_COUNT = Setting(COUNT, int, 1, MAX_COUNT)
_NO_OVERRIDES: Mapping[str, Any] = {}


@dataclass(frozen=True, slots=True)
class Line:
    """What one line asks for: `count` images of a prompt for each of its seeds.

    `seeds` is empty where the line leaves the seed to the run; a seed is the first of its images', and the next
    ones count up. `overrides` are checked values by field of `Job`, behind `init.` by field of its `Init`; `init`
    None takes the image away. `number` counts the source's lines from 1.
    """

    number: int
    prompt: str
    seeds: tuple[int, ...] = ()
    count: int = 1
    overrides: Mapping[str, Any] = field(default_factory=lambda: _NO_OVERRIDES)


def numbered(lines: Iterable[str]) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, with their numbers."""
    return ((i, text) for i, text in enumerate(lines, 1) if text and not text.isspace())


def parse_field(field: str, text: str) -> Any:
    """The value of the right type that a text stands for; ValueError says what is wrong."""
    if field == SEEDS:
        return tuple(map(SETTINGS["seed"].parse, text.split(",")))
    return _setting(field).parse(text)


def check_field(field: str, value: Any) -> Any:
    """The value as a job holds it; ValueError says what is wrong with its type or range."""
    if field == SEEDS:
        return tuple(map(SETTINGS["seed"].check, value))
    return _setting(field).check(value)


def check_value(field: str, value: Any) -> Any:
    """As `check_field`, where a text that names one of several choices may be spelt as in a line."""
    spelt = isinstance(value, str) and field != SEEDS and _setting(field).choices
    return check_field(field, parse_field(field, value) if spelt else value)


def is_number(field: str) -> bool:
    """Whether the values of a field are numbers."""
    return field == SEEDS or _setting(field).kind in (int, float)


def _setting(field: str) -> Setting:
    return _COUNT if field == COUNT else SETTINGS[field]


class Values:
    """Collects what one line says, and notes what is wrong with it."""

    def __init__(self, number: int, faults: Faults) -> None:
        self._number, self._faults = number, faults
        self._good = True
        self._values: dict[str, Any] = {}
        self._counts: dict[str, int] = {}

    def fault(self, what: str) -> None:
        """Notes what is wrong with the line."""
        self._good = False
        self._faults.add(self._number, what)

    def add(self, name: str, field: str, read: Callable[[], Any]) -> None:
        """Takes the value that `read` gives for a field, under the name it has in the line."""
        try:
            value = read()
        except ValueError as error:
            self.fault(f"{printable(name)} {error}")
            return
        target, key = (self._counts, name) if field == COUNT else (self._values, field)
        if key in target:
            self.fault(f"{printable(name)} is given twice; leave one out")
        target[key] = value

    def add_text(self, name: str, field: str, text: str) -> None:
        """Takes the value that a text stands for."""
        self.add(name, field, lambda: check_field(field, parse_field(field, text)))

    def line(self) -> Line | None:
        """The line, or None if anything is wrong with it."""
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
