"""JSON whose content is not known: its type, and readers that return a value of one type, or an empty one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TypeAlias

Json: TypeAlias = "dict[str, Json] | list[Json] | str | int | float | None"
JsonObject: TypeAlias = "dict[str, Json]"


def load_json(text: str | bytes) -> Json:
    """Parses JSON. Raises ValueError for any other text, and for brackets nested deeper than Python can follow."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("brackets are nested too deeply") from None


def load_object(text: str) -> JsonObject:
    """Parses a JSON object; empty for any other text."""
    try:
        return as_object(load_json(text))
    except ValueError:
        return {}


def as_object(value: Json) -> JsonObject:
    """Returns an object; empty for any other value."""
    return value if isinstance(value, dict) else {}


def as_list(value: Json) -> list[Json]:
    """Returns a list; empty for any other value."""
    return value if isinstance(value, list) else []


def objects_of(value: Json) -> Iterator[JsonObject]:
    """Yields the objects in a list; none for any other value."""
    return (entry for entry in as_list(value) if isinstance(entry, dict))


def as_text(value: Json) -> str:
    """Returns a text; empty for any other value."""
    return value if isinstance(value, str) else ""
