"""The config of a stage of training, and changes to it on the command line."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from ldm.places import find
from ldm.training.runs import Optimisation, RunSettings
from ldm.util import InputError, printable

_OF_THE_COMMAND = ("run.logdir", "run.steps", "run.max_time", "run.bar")  # options, or of another section


def read_yaml(path: str | Path | None, changes: Sequence[str] = ()) -> tuple[DictConfig, DictConfig]:
    """Returns the mapping in the YAML at `path`, empty without one, and the dotted changes, as `batch_size=32`."""
    shown = "the changes" if path is None else f"the config {printable(path)}, or a change to it,"
    for change in changes:
        if "=" not in change:
            raise InputError(f"{printable(change)} is not a change; write SETTING=VALUE")
    try:
        config = OmegaConf.create({}) if path is None else OmegaConf.load(find(path))
        changed = OmegaConf.from_dotlist(list(changes))
    except (FileNotFoundError, IsADirectoryError):
        raise InputError(f"there is no config {printable(path)}") from None
    except (OSError, YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        reason = " ".join(printable(error).split())[:200]
        raise InputError(f"{shown} cannot be read: {reason}") from None
    if not isinstance(config, DictConfig):
        raise InputError(f"the config {printable(path)} is not a mapping")
    return config, changed


def read_config(path: Path, changes: Sequence[str] = ()) -> DictConfig:
    """Reads the YAML at `path` with dotted changes such as `training.batch_size=32`, each of a known setting."""
    config, changed = read_yaml(path, changes)
    known = _settings(config)
    for change in changes:
        name = change.partition("=")[0]
        _check_setting(printable(name), OmegaConf.select(changed, name), known)
    return OmegaConf.merge(config, changed)  # type: ignore[return-value]


def _settings(config: DictConfig) -> dict[str, tuple[type, ...]]:
    """Returns the types of all settings that a stage's config can have, by their dotted names."""
    known: dict[str, tuple[type, ...]] = {"training.start_from": (str,)}
    for section, of in (("training.optimisation", Optimisation), ("run", RunSettings)):
        if OmegaConf.select(config, section) is not None:
            hints = get_type_hints(of)
            known |= {
                f"{section}.{field.name}": get_args(hint) if isinstance(hint, UnionType) else (hint,)
                for field in fields(of)
                for hint in [hints[field.name]]
            }

    def add(node: DictConfig, prefix: str) -> None:
        for key, value in node.items():
            if isinstance(value, DictConfig):
                add(value, f"{prefix}{key}.")
            else:
                known.setdefault(f"{prefix}{key}", (value.__class__,))

    add(config, "")
    return {name: kinds for name, kinds in known.items() if name not in _OF_THE_COMMAND}


def _check_setting(name: str, value: Any, known: Mapping[str, tuple[type, ...]]) -> None:
    if name not in known:
        last = {full.rpartition(".")[2]: full for full in known}
        close = [last[name.rpartition(".")[2]]] if name.rpartition(".")[2] in last else []
        close = close or difflib.get_close_matches(name, known, 1)
        raise InputError(
            f"unknown setting {name}; "
            + (f"did you mean {close[0]}?" if close else f"choose from {', '.join(sorted(known))}")
        )
    kind, *others = known[name]
    if value is None and type(None) in others:
        return
    if kind in (int, float):
        numbers = int if kind is int else int | float
        least = 1 if kind is int and not name.endswith("warm_up_steps") else 0
        if isinstance(value, bool) or not isinstance(value, numbers) or not least <= value < math.inf:
            what = "a whole number" if kind is int else "a number"
            raise InputError(f"{name} is {printable(value)}; give {what} of {least} or more")
    elif kind is str and not isinstance(value, str):
        raise InputError(f"{name} is {printable(value)}; give a text")
