"""Reads settings from a YAML file, and from changes such as `rank=16` on the command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from omegaconf import OmegaConf

from ldm.training.config import read_yaml


def read_settings(path: str | None, changes: Sequence[str] = ()) -> dict[str, Any]:
    """Returns the settings in the YAML file at `path`, if one is given, with `changes`; they are not checked here."""
    found = OmegaConf.to_container(OmegaConf.merge(*read_yaml(path, changes)), resolve=False)
    return {str(name): value for name, value in found.items()}  # type: ignore[union-attr]
