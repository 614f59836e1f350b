"""Reads prompt lists that are one document: JSON, TOML and YAML, as other programs write them."""

from __future__ import annotations

import bisect
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from ldm.json_value import Json
from ldm.prompts.files import Faults
from ldm.prompts.lines import Line
from ldm.prompts.tables import Object, read_entry
from ldm.util import is_list, is_mapping, printable

PLAIN = "--prompt_format plain takes every line as it is"
_SPACE = re.compile(r"[ \t\r\n]*")
_JSON = re.compile(
    r"""\s* (?: \{ \s* $
          | \[ \s* (?: $ | \{ | \] | "(?:[^"\\]|\\.)*" \s* (?: , | \] \s* ,? \s* $ | $ ) | '.*' \s* [],] ) )""",
    re.VERBOSE,
)
_TOML = re.compile(r"\s*\[\[?\s*prompts?\s*(\.\s*\w+\s*)*\]\]?\s*(#.*)?")
_ASSIGNMENT = re.compile(r"\s*\w+\s*=")
_YAML = re.compile(r"---\s*|-\s+(prompt|text|caption)\s*:\s.*|prompts?\s*:\s*([|>\[].*)?")


def is_json(text: str) -> bool:
    """Returns whether a first line begins an array of texts or objects, or an object of several lines."""
    return _JSON.match(text) is not None


def is_valid_json(lines: Sequence[str]) -> bool:
    """Returns whether the lines are JSON values, one after another."""
    try:
        return all(True for _ in _json_entries("\n".join(lines)))
    except (ValueError, RecursionError):
        return False


def is_toml(text: str, lines: Sequence[str]) -> bool:
    """Returns whether a first line is the head of a table of prompts, and others assign values."""
    return _TOML.fullmatch(text) is not None and any(map(_ASSIGNMENT.match, lines))


def is_yaml(text: str) -> bool:
    """Returns whether a first line begins a list of prompts, or of mappings with one."""
    return _YAML.fullmatch(text) is not None


def read_json(lines: Sequence[str], faults: Faults) -> Iterator[Line]:
    """Reads an array of prompts and of objects with the fields of `Job`, or such objects one after another."""
    text = "\n".join(lines)
    starts = list(itertools.accumulate((len(line) + 1 for line in lines), initial=0))

    def place(at: int) -> tuple[int, int]:
        number = bisect.bisect_right(starts, at)
        return number, at - starts[number - 1] + 1

    entries, number = _json_entries(text), 1
    while True:
        try:
            at, entry = next(entries, (0, None))
        except json.JSONDecodeError as error:
            number, column = place(error.pos)
            faults.add(number, f"is not valid JSON ({error.msg} at column {column}); {PLAIN}")
            return
        except (ValueError, RecursionError):  # a number of thousands of digits; brackets in brackets in ...
            faults.add(number, f"is not followed by JSON that can be read; {PLAIN}")
            return
        if entry is None:
            return
        number, _ = place(at)
        yield from read_entry(number, entry, faults)


def _json_entries(text: str) -> Iterator[tuple[int, Any]]:
    """Yields the position of each entry, and the entry; those of arrays at the top level are separate entries."""
    decoder = json.JSONDecoder(object_pairs_hook=Object)
    at = _after_space(text, 0)
    while at < len(text):
        if text[at] != "[":
            entry, end = decoder.raw_decode(text, at)
            yield at, entry
        else:
            end = _after_space(text, at + 1)
            while not text.startswith("]", end):
                start = end
                entry, end = decoder.raw_decode(text, start)
                yield start, entry
                end = _after_space(text, end)
                if text.startswith(",", end):
                    end = _after_space(text, end + 1)
                elif not text.startswith("]", end):
                    raise json.JSONDecodeError("Expecting ',' delimiter", text, end)
            end += 1
        at = _after_space(text, end)
        if text.startswith(",", at):
            raise json.JSONDecodeError("Extra data", text, at)


def _after_space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return at if match is None else match.end()


def read_toml(lines: Sequence[str], faults: Faults) -> Iterator[Line]:
    """Reads kohya's `[prompt]` with its `[[prompt.subset]]`, or tables `[[prompts]]`."""
    try:
        import tomllib
    except ImportError:  # Python 3.10
        faults.add(1, "is TOML, which needs Python 3.11 or later; write the list as JSON")
        return
    try:
        document: Json = tomllib.loads("\n".join(lines))
    except (ValueError, RecursionError) as error:
        faults.add(1, f"is not valid TOML ({printable(error)[:200]})")
        return
    if list(document) == ["prompt"] and isinstance(inner := document["prompt"], dict):
        document = inner
    yield from read_entry(1, _as_objects(document), faults)


def read_yaml(lines: Sequence[str], faults: Faults) -> Iterator[Line]:
    """Reads a list of prompts and of mappings with the fields of `Job`, also below `prompts:`."""
    import yaml

    class Loader(yaml.SafeLoader):
        """A YAML loader without aliases, which can make a small file huge."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError("aliases are not supported")
            return super().compose_node(parent, index)

    loader = Loader("\n".join(lines))
    try:
        node = loader.get_single_node()
        document = None if node is None else _as_objects(loader.construct_document(node))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        faults.add(1, f"is not valid YAML ({printable(' '.join(str(error).split()))[:200]})")
        return
    if isinstance(node, yaml.SequenceNode) and is_list(document):
        for entry, of_node in zip(document, node.value, strict=True):
            yield from read_entry(of_node.start_mark.line + 1, entry, faults)
    else:
        yield from read_entry(1, document, faults)


def _as_objects(value: Any) -> Any:
    """Returns the value with its mappings converted to `Object`."""
    if is_mapping(value):
        return Object((str(name), _as_objects(entry)) for name, entry in value.items())
    return [_as_objects(entry) for entry in value] if is_list(value) else value
