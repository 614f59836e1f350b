"""The settings of `--fast`, chosen by measurement: see `ldm/runtime/README.md`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# values of a job's fields, which options that are given replace
FAST: Mapping[str, Mapping[str, Any]] = {
    "exact": {},
    "balanced": {"cache_steps": (3,)},
    "draft": {"cache_steps": (5,)},
}


def with_fast(choice: str, values: Mapping[str, Any], usual: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values of fields with those of a choice where they are the `usual` ones."""
    return {
        **values,
        **{name: value for name, value in FAST[choice].items() if values.get(name) in (None, usual[name])},
    }
