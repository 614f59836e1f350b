"""Prompt lists as JSON lines and as CSV."""

from __future__ import annotations

import csv
import difflib
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from ldm.fields import SETTINGS, find_setting
from ldm.prompts.files import Faults
from ldm.prompts.lines import COUNT, Line, Values, check_field, numbered
from ldm.util import printable

_JSON_BEGINS = re.compile(r'\s*\{\s*"[^"]*"\s*:')


def read_jsonl(lines: Sequence[str], faults: Faults) -> Iterator[Line]:
    """A JSON object a line: names and values of the fields of `Job`, `init` as an object or the picture's path."""
    return filter(None, (_json_line(number, text, faults) for number, text in numbered(lines)))


def _json_line(number: int, text: str, faults: Faults) -> Line | None:
    values = Values(number, faults)
    try:
        entries = _json_object(text)
    except ValueError as error:
        values.fault(str(error))
        return values.line()
    for name, value in entries:
        _add_entry(values, name, value)
    return values.line()


def _json_object(text: str) -> list[tuple[str, Any]]:
    """The entries of a JSON object, of `init` as `init.` and their names. Raises ValueError with what is wrong."""
    try:
        entries = json.loads(text, object_pairs_hook=_Object)
    except json.JSONDecodeError as error:
        raise ValueError(f"is no JSON object ({error.msg} at column {error.colno})") from None
    except (ValueError, RecursionError):  # a number of thousands of digits; brackets in brackets in ...
        raise ValueError("is no JSON object that can be read") from None
    if not isinstance(entries, _Object):
        raise ValueError('is no JSON object; write one such as {"prompt": "a cat", "steps": 20}')
    return [pair for name, value in entries for pair in _flat(name, value)]


class _Object(list[tuple[str, Any]]):
    """A JSON object as pairs, so that a name given twice is seen."""


def _flat(name: str, value: Any) -> list[tuple[str, Any]]:
    if name != "init" or value is None:
        return [(name, value)]
    if isinstance(value, _Object):
        return [(f"init.{key}", entry) for key, entry in value]
    return [("init.image", value)]


def _add_entry(values: Values, name: str, value: Any) -> None:
    field = _column(name)
    if field is None and not (name == "init" and value is None):
        values.fault(_unknown(name))
    else:
        values.add(name, field or name, lambda: value if field is None else check_field(field, value))


def _column(name: str) -> str | None:
    """What a name in JSON lines or a CSV header stands for; None if it is unknown."""
    if name in ("n_iter", "n_samples", COUNT):
        return COUNT
    setting = find_setting(name)
    return None if setting is None else setting.field


def _unknown(name: str) -> str:
    names = [*SETTINGS, COUNT]
    like = difflib.get_close_matches(name[:80], names, 1)
    meant = f"did you mean {like[0]}?" if like else f"the names are {', '.join(names)}"
    return f"{printable(name)[:80] or 'an empty name'} is unknown; {meant}"


def read_csv(lines: Sequence[str], faults: Faults) -> Iterator[Line]:
    """A header with names of fields of `Job`, then a row a line; cells are quoted as spreadsheets do it."""
    rows = _csv_rows(lines, faults)
    number, header = next(rows, (1, []))
    names = [name.strip() for name in header]
    columns = [_column(name) for name in names]
    problems = [_unknown(name) for name, column in zip(names, columns, strict=True) if column is None]
    twice = {column for column in columns if column and column != COUNT and columns.count(column) > 1}
    problems += [f"{column} has more than one column; leave all but one out" for column in sorted(twice)]
    if "prompt" not in columns:
        problems.append("the header names no prompt; the first line must name the columns")
    for problem in problems:
        faults.add(number, problem)
    if not problems:
        titles = [(name, column or "") for name, column in zip(names, columns, strict=True)]
        yield from filter(None, (_csv_line(number, titles, row, faults) for number, row in rows))


def _csv_line(
    number: int, titles: Sequence[tuple[str, str]], row: Sequence[str], faults: Faults
) -> Line | None:
    """A row under names and their fields; an empty cell says nothing, but for an empty prompt."""
    values = Values(number, faults)
    if len(row) != len(titles):
        values.fault(f"has {len(row)} cells, but the header {len(titles)}; quote a cell with a comma in it")
        return values.line()
    for (name, column), cell in zip(titles, row, strict=True):
        if cell or column == "prompt":
            values.add_text(name, column, cell)
    return values.line()


def _csv_rows(lines: Sequence[str], faults: Faults) -> Iterator[tuple[int, list[str]]]:
    """The rows with the numbers of their first lines; a quoted cell may hold ends of lines."""
    delimiter = _delimiter(lines)
    rows = csv.reader(
        (text + "\n" for text in lines), delimiter=delimiter, skipinitialspace=True, strict=True
    )
    while True:
        number = rows.line_num + 1
        try:
            row = next(rows, None)
        except csv.Error as error:
            faults.add(number, f"is no row of CSV: {printable(error)}")
            continue
        if row is None:
            return
        if any(row):
            yield number, row


def _delimiter(lines: Sequence[str]) -> str:
    """The sign between the names of the header: a comma, or what spreadsheets write instead."""
    _, header = next(numbered(lines))
    return max(",;\t", key=header.count)


def header_names(text: str) -> list[str]:
    """The names of a line that looks like a CSV header: several words, `prompt` among them; else none."""
    names = [name.strip().strip('"') for name in text.split(_delimiter([text]))]
    words = all(re.fullmatch(r"[\w.-]+", name) for name in names)
    return names if len(names) > 1 and words and "prompt" in names else []


def unknown_names(names: Sequence[str]) -> list[str]:
    """Those that are no column's."""
    return [name for name in names if _column(name) is None]


def is_json_object(text: str) -> bool:
    """Whether a line begins as a JSON object does, with a name in it."""
    return _JSON_BEGINS.match(text) is not None
