"""Reads prompt lists as JSON lines and as CSV, with other programs' names for the fields of a job."""

from __future__ import annotations

import csv
import difflib
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ldm.fields import SETTINGS, find_setting
from ldm.prompts.files import Faults
from ldm.prompts.lines import COUNT, Line, Values, check_value, numbered
from ldm.util import printable

logger = logging.getLogger(__name__)

_JSON_BEGINS = re.compile(r'\s*\{\s*"[^"]*"\s*:')

# names in files of other programs: kohya's sample prompts, the web UI's API and styles, diffusers, data sets
_FOREIGN: Mapping[str, str] = {
    **dict.fromkeys(("prompts", "text", "caption", "positive", "positive_prompt"), "prompt"),
    **dict.fromkeys(("negative", "neg_prompt", "negative_prompts"), "negative_prompt"),
    **dict.fromkeys(("sample_steps", "num_inference_steps", "sampling_steps", "step"), "steps"),
    **dict.fromkeys(("cfg_scale", "cfg", "guidance_scale"), "scale"),
    **dict.fromkeys(("sampler_name", "sample_sampler"), "sampler"),
    **dict.fromkeys(("denoising_strength", "denoise"), "strength"),
    **dict.fromkeys(("batch_size", "num_images", "num_images_per_prompt"), COUNT),
}
# these only identify the entry
_LABELS = (
    "",
    "name",
    "id",
    "index",
    "category",
    "challenge",
    "note",
    "notes",
    "file_name",
    "filename",
    "image_name",
)


def read_jsonl(lines: Sequence[str], faults: Faults) -> Iterator[Line]:
    """Reads a JSON object a line: names and values of fields of `Job`, `init` as an object or the image's path."""
    return (line for number, text in numbered(lines) for line in _json_line(number, text, faults))


def _json_line(number: int, text: str, faults: Faults) -> list[Line]:
    try:
        entry = parse_json(text)
        if not isinstance(entry, Object):
            raise ValueError('is not a JSON object; write one such as {"prompt": "a cat", "steps": 20}')
    except ValueError as error:
        faults.add(number, str(error))
        return []
    return read_entry(number, entry, faults)


def parse_json(text: str) -> Any:
    """Parses JSON text, with objects as `Object`. Raises ValueError with the reason."""
    try:
        return json.loads(text, object_pairs_hook=Object)
    except json.JSONDecodeError as error:
        raise ValueError(f"is not valid JSON ({error.msg} at column {error.colno})") from None
    except (ValueError, RecursionError):  # a number of thousands of digits; deeply nested brackets
        raise ValueError("is not JSON that can be read") from None


class Object(list[tuple[str, Any]]):
    """A JSON object as pairs, so that repeated names are detected."""


def read_entry(number: int, entry: Any, faults: Faults, common: Sequence[tuple[str, Any]] = ()) -> list[Line]:
    """Returns the lines of one entry of a list: a prompt, or an object of a job's fields.

    Its names take precedence over those in `common`. An object whose prompt is a list has a line for each entry,
    with all its other values; so has kohya's, whose list is called `subset`.
    """
    if isinstance(entry, str):
        entry = Object([("prompt", entry)])
    values = Values(number, faults)
    if not isinstance(entry, Object):
        values.fault(f"{printable(repr(entry))[:80]} is not a prompt; write a text in quotes or an object")
        return []
    pairs = [pair for name, value in entry for pair in _flat(name, value)]
    several = next((pair for pair in pairs if isinstance(pair[1], list) and pair[0] in _LISTS), None)
    if several is not None:
        pairs.remove(several)
        of_each = several[1] if not isinstance(several[1], Object) else [several[1]]
        shared = [*pairs, *_but(common, pairs)]
        return [line for one in of_each for line in read_entry(number, one, faults, shared)]
    for name, value in (*pairs, *_but(common, pairs)):
        _add_entry(values, name, value)
    line = values.line()
    return [] if line is None else [line]


_LISTS = ("prompts", "prompt", "subset", "subsets")


def _but(common: Sequence[tuple[str, Any]], own: Sequence[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Returns the common values of several entries, without the names that one of them sets itself."""
    set_here = {column(name) for name, _ in own}
    return [(name, value) for name, value in common if column(name) not in set_here]


def _flat(name: str, value: Any) -> list[tuple[str, Any]]:
    """Returns the pairs that an entry adds: those of `init` as `init.` and their names."""
    if name != "init" or value is None:
        return [(name, value)]
    if isinstance(value, Object):
        return [(f"init.{key}", entry) for key, entry in value]
    return [("init.image", value)]


def _add_entry(values: Values, name: str, value: Any) -> None:
    field = column(name)
    if field is None and name == "init" and value is None:
        values.add(name, name, lambda: None)
    elif field is None and value not in (
        None,
        False,
        [],
    ):  # settings that are off anyway, as in the web UI's API
        values.fault(_unknown(name))
    elif field:
        values.add(name, field, lambda: check_value(field, value))


def column(name: str) -> str | None:
    """Returns the field of a name in JSON, a CSV header and the like: "" for a label, None if it is unknown."""
    if name in ("n_iter", "n_samples", COUNT):
        return COUNT
    setting = find_setting(name)
    if setting is not None:
        return setting.field
    plain = "_".join(re.split(r"[\s_-]+", name.strip().lower()))
    if plain in _LABELS:
        return ""
    setting = find_setting(plain)
    return _FOREIGN.get(plain, None if setting is None else setting.field)


def _unknown(name: str) -> str:
    names = [*SETTINGS, COUNT]
    like = difflib.get_close_matches(name[:80], names, 1)
    meant = f"did you mean {like[0]}?" if like else f"the names are {', '.join(names)}"
    return f"{printable(name)[:80] or 'an empty name'} is unknown; {meant}"


def read_csv(lines: Sequence[str], faults: Faults) -> Iterator[Line]:
    """Reads a header with names of fields of `Job`, then a row a line; cells are quoted as spreadsheets do it."""
    rows = _csv_rows(lines, faults)
    number, header = next(rows, (1, list[str]()))
    names = [name.strip() for name in header]
    fields = [column(name) for name in names]
    problems = [_unknown(name) for name, field in zip(names, fields, strict=True) if field is None]
    twice = {field for field in fields if field and field != COUNT and fields.count(field) > 1}
    problems += [f"{field} has more than one column; leave all but one out" for field in sorted(twice)]
    if "prompt" not in fields:
        problems.append("the header names no prompt; the first line must name the columns")
    for problem in problems:
        faults.add(number, problem)
    if not problems:
        if unused := [name for name, field in zip(names, fields, strict=True) if field == ""]:
            logger.info("%s: not used: column %s", faults.name, printable(", ".join(unused))[:200])
        titles = [(name, field or "") for name, field in zip(names, fields, strict=True)]
        yield from filter(None, (_csv_line(number, titles, row, faults) for number, row in rows))


def _csv_line(
    number: int, titles: Sequence[tuple[str, str]], row: Sequence[str], faults: Faults
) -> Line | None:
    """Reads a row below names and their fields; an empty cell is ignored, except an empty prompt."""
    values = Values(number, faults)
    if len(row) != len(titles):
        values.fault(f"has {len(row)} cells, but the header {len(titles)}; quote a cell with a comma in it")
        return values.line()
    for (name, field), cell in zip(titles, row, strict=True):
        if field == "prompt" and "{prompt}" in cell and ("name", "") in titles:
            values.fault("is a style, whose {prompt} is replaced by the prompt; write the whole prompt")
        elif field and (cell or field == "prompt"):
            values.add_text(name, field, cell)
    return values.line()


def _csv_rows(lines: Sequence[str], faults: Faults) -> Iterator[tuple[int, list[str]]]:
    """Yields the rows with the numbers of their first lines; a quoted cell may contain line ends."""
    delimiter = _delimiter(lines)
    rows = csv.reader(
        (text + "\n" for text in lines), delimiter=delimiter, skipinitialspace=True, strict=True
    )
    while True:
        number = rows.line_num + 1
        try:
            row = next(rows, None)
        except csv.Error as error:
            faults.add(number, f"is not a row of CSV: {printable(error)}")
            continue
        if row is None:
            return
        if any(row):
            yield number, row


def _delimiter(lines: Sequence[str]) -> str:
    """Returns the delimiter of the header: a comma, or another one that spreadsheets write."""
    _, header = next(numbered(lines))
    return max(",;\t", key=header.count)


def header_names(text: str) -> list[str]:
    """Returns the names of a line that looks like a CSV header, else none.

    They are several words, `prompt` among them, or names that are all known, one of them a prompt's.
    """
    names = [name.strip().strip('"') for name in text.split(_delimiter([text]))]
    if len(names) < 2 or not all(re.fullmatch(r"[\w. -]+", name) for name in names):
        return []
    known = [column(name) for name in names]
    all_known = "prompt" in known and None not in known
    words = "prompt" in names and not any(" " in name for name in names)
    return names if all_known or words else []


def unknown_names(names: Sequence[str]) -> list[str]:
    """Returns those that are not the names of columns."""
    return [name for name in names if column(name) is None]


def is_json_object(text: str) -> bool:
    """Returns whether a line begins like a JSON object, with a name in it."""
    return _JSON_BEGINS.match(text) is not None
