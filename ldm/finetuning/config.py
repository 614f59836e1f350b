"""Reads settings from a YAML file, and from changes such as `rank=16` on the command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from ldm.places import find
from ldm.util import InputError, printable


def read_settings(path: str | None, changes: Sequence[str] = ()) -> dict[str, Any]:
    """Returns the settings in the YAML file at `path`, if one is given, with `changes`; they are not checked here."""
    for change in changes:
        if "=" not in change:
            raise InputError(f"{printable(change)} is not a change; write SETTING=VALUE")
    try:
        config = OmegaConf.create({}) if path is None else OmegaConf.load(find(path))
        if not isinstance(config, DictConfig):
            raise InputError(f"the config {printable(path)} is not a mapping of settings")
        merged = OmegaConf.merge(config, OmegaConf.from_dotlist(list(changes)))
        found = OmegaConf.to_container(merged, resolve=False)
    except (FileNotFoundError, IsADirectoryError):
        raise InputError(f"there is no config {printable(path)}") from None
    except (OSError, YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        reason = " ".join(printable(error).split())[:200]
        raise InputError(f"the settings of {printable(path or changes)} cannot be read: {reason}") from None
    return {str(name): value for name, value in found.items()}  # type: ignore[union-attr]
