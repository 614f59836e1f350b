"""The fields of a job: one table of names, types, ranges and choices, used to check every value from outside.

Outside is whatever this toolkit did not compute: options, prompt lists, sweeps, and the texts in image files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ldm.job import Init, Job
from ldm.util import InputError, printable

# The highest seed of each noise generator. torch's take longer ones, of which that of the CPU uses the lower 32 bits.
MAX_SEEDS: Mapping[str, int] = {
    "philox": 2**64 - 1,
    "cpu": 2**32 - 1,
    "device": 2**32 - 1,
    "numpy": 2**32 - 1,
}
MAX_TEXT = 65_536  # characters
MAX_LORAS = 100
_MAX_SIDE = 65_536
_INIT = "init."


@dataclass(frozen=True, slots=True)
class Setting:
    """One field of a `Job`, or `init.` and one of its `Init`: its type and valid values.

    `low` and `high` are inclusive; of a text without `choices`, and of a tuple with `many`, `high` limits the
    length. A tuple has a setting for each of its entries in `row`; with `many` it is a tuple of such tuples. `strict`
    texts have no lone surrogates, which UTF-8 cannot hold.
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

    def parse(self, text: str) -> Any:
        """Parses the value from text. Raises ValueError, with the reason, if it is of another type."""
        try:
            if self.row and not self.many:
                return tuple(part.parse(word) for part, word in zip(self.row, text.split(","), strict=True))
            if self.kind is bool:
                return {"true": True, "false": False}[text.strip().lower()]
            if self.choices:
                return "_".join(text.lower().split())
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
            return tuple(map(self._as_row, value))
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
            few = isinstance(value, list | tuple) and len(value) <= self.high
            return few and all(map(self._fits_row, value))
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
        if not isinstance(value, list | tuple) or len(value) != len(self.row):
            return False
        return all(part.fits(entry) for part, entry in zip(self.row, value, strict=True))

    def _refusal(self, value: Any) -> str:
        one = self.row and not self.many and isinstance(value, tuple)
        return f"is {shown(','.join(map(str, value)) if one else value)}; give {self.wanted()}"

    def wanted(self) -> str:
        """Describes in words the values that the field can have."""
        if self.row:
            each = [part.wanted() for part in self.row]
            if not self.many and len(set(each)) == 1:
                return f"{len(each)} values, each {each[0]}"
            entries = ", ".join(each)
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


_RANGES: Mapping[str, Mapping[str, Any]] = {
    "prompt": {"high": MAX_TEXT},
    "negative_prompt": {"high": MAX_TEXT},
    "seed": {"low": 0, "high": max(MAX_SEEDS.values())},
    "width": {"low": 8, "high": _MAX_SIDE, "multiple": 8},
    "height": {"low": 8, "high": _MAX_SIDE, "multiple": 8},
    "steps": {"low": 1, "high": 999},
    "eta": {"low": 0, "high": 10},
    "batch_index": {"low": 0},
    "strength": {"low": 0, "high": 1},
    "upscale": {"low": 1, "high": 8},
    "upscale_strength": {"low": 0, "high": 1},
    "loras": {"high": MAX_LORAS},
    "init.width": {"low": 1, "high": _MAX_SIDE},
    "init.height": {"low": 1, "high": _MAX_SIDE},
    "init.outpaint": {"low": 0, "high": _MAX_SIDE},
    "init.mask_blur": {"low": 0, "high": 256},
}


def _setting(field: str, hint: Any) -> Setting:
    """Builds the setting of a field from its annotation and `_RANGES`."""
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    (kind,) = (option for option in options if option is not type(None))
    extra: dict[str, Any] = {"optional": len(options) > 1, **_RANGES.get(field, {})}
    if get_origin(kind) is tuple:
        many = get_args(kind)[-1] is ...
        row = get_args(get_args(kind)[0]) if many else get_args(kind)
        parts = tuple(_setting("" if many else field, part) for part in row)
        return Setting(field, tuple, row=parts, many=many, **extra)
    if get_origin(kind) is Literal:
        kind, extra["choices"] = str, get_args(kind)
    return Setting(field, kind, **extra)


def _settings(cls: type, prefix: str = "") -> dict[str, Setting]:
    hints = get_type_hints(cls)
    names = [prefix + field.name for field in fields(cls) if field.name != "init"]
    return {name: _setting(name, hints[name.removeprefix(prefix)]) for name in names}


SETTINGS: Mapping[str, Setting] = _settings(Job) | _settings(Init, _INIT)


# names of options that differ from those of the fields
OWN_NAMES: Mapping[str, str] = {
    "ddim_steps": "steps",
    "ddim_eta": "eta",
    "W": "width",
    "H": "height",
    "init-img": "init.image",
    "init_img": "init.image",
    "mask": "init.mask",
    "resize": "init.resize",
    "background": "init.background",
    "mask_blur": "init.mask_blur",
    "outpaint": "init.outpaint",
}


def find_setting(name: str) -> Setting | None:
    """Returns the setting called `name`: a field of `Job`, `init.` and one of `Init`, or an option's name."""
    return SETTINGS.get(OWN_NAMES.get(name, name))


def override(job: Job, values: Mapping[str, Any]) -> Job:
    """Returns the job with other values, by field; `init.` and a field change its image, `init` None removes it.

    Raises ValueError if a job without an image gets only other fields of one.
    """
    of_init = {name.removeprefix(_INIT): v for name, v in values.items() if name.startswith(_INIT)}
    own = {name: v for name, v in values.items() if name != "init" and not name.startswith(_INIT)}
    start = None if "init" in values else job.init
    if of_init and start is None:
        if "image" not in of_init:
            raise ValueError(f"{', '.join(of_init)} of an image to start from, but there is none; give one")
        start = Init(of_init["image"])
    return replace(job, init=replace(start, **of_init) if start is not None else None, **own)


# values in files are read exactly, even if a run refuses them
_HELD = {name: replace(setting, strict=False) for name, setting in SETTINGS.items()}


def values_of(job: Job) -> dict[str, Any]:
    """Returns the values of a job by field, those of its image, if it has one, prefixed with `init.`."""
    own = {field.name: getattr(job, field.name) for field in fields(Job) if field.name != "init"}
    return own if job.init is None else own | _values_of_init(job.init)


def _values_of_init(init: Init) -> dict[str, Any]:
    return {_INIT + field.name: getattr(init, field.name) for field in fields(Init)}


def read_held(field: str, value: Any) -> Any:
    """Reads a field's value, as a job holds it, from the text of a file. InputError names the field."""
    setting = _HELD[field]
    if not setting.fits(value):
        raise InputError(f"job.{field} cannot be {shown(value)}; give {setting.wanted()}")
    return setting.check(value)


def check_fields(job: Job) -> None:
    """Checks that every field of a job has a valid value, else raises an InputError that names the field."""
    for field, value in values_of(job).items():
        try:
            SETTINGS[field].check(value)
        except ValueError as error:
            raise InputError(f"{field} {error}") from None
    check_seed(job.seed, job.rng)


def check_seed(seed: int, rng: str) -> None:
    """Checks that a noise generator accepts a seed, else raises InputError; both are valid values of their fields."""
    if seed > MAX_SEEDS[rng]:
        raise InputError(
            f"seed is {seed}, but the noise generator {rng} takes seeds of {MAX_SEEDS[rng].bit_length()} bits; "
            f"use --rng philox, or a seed from 0 to {MAX_SEEDS[rng]}"
        )


def count_up(seed: int, n: int, rng: str) -> int:
    """Returns the seed `n` images after (below 0: before) `seed`; 0 follows the generator's highest."""
    return (seed + n) % (MAX_SEEDS[rng] + 1)
