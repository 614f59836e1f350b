"""One row of the table of a job's fields: how it is set, checked and written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ldm.setting import Choices

INIT = "init."  # before the name of a field of a job's `Init`


class Switch(NamedTuple):
    """An option without a value, which sets a field to `value`."""

    option: str
    value: Any
    help: str


@dataclass(frozen=True, slots=True)
class Field:
    """One field of `Job`, or after `init.` of its `Init`, and how it is set, checked and written.

    `option` is the name of its option, without dashes, `group` that of the options' group in `--help`; an option that
    is `unset` by default leaves the value to the run. `limits` are those of its `Setting`. `label` names its entry
    in an image's text, where `words` replace values; the entry of a default value is written only if it is `always`
    written. `is_file` marks paths, whose folders are not written. Fields `of_run` are the same for all jobs of a run.
    `choices` and `spell` are those of its `Setting`, where its annotation does not list them. An option that is given
    once for each entry of a list has `entry`, that of its `Setting`, and `entry_text`, which writes one.
    """

    name: str
    limits: Mapping[str, Any] = field(default_factory=dict[str, Any])
    option: str = ""
    group: str = ""
    metavar: str | None = None
    help: str = ""
    switches: tuple[Switch, ...] = ()
    unset: bool = False
    label: str = ""
    words: Mapping[str, str] = field(default_factory=dict[str, str])
    always: bool = False
    is_file: bool = False
    of_run: bool = False
    choices: Choices | None = None
    spell: Callable[[str], str] | None = None
    entry: Callable[[str], tuple[Any, ...]] | None = None
    entry_text: Callable[..., str] = str

    @property
    def dest(self) -> str:
        """The attribute of the option among parsed options."""
        return self.option.replace("-", "_")

    @property
    def of_init(self) -> bool:
        """Whether it is a field of `Init`."""
        return self.name.startswith(INIT)
