"""Reads prompt lists in the dialects of several programs: lines with options, JSON lines, CSV and documents.

plain       every line is a literal prompt
a1111       --prompt a cat --steps 20                AUTOMATIC1111's "prompts from file" script
kohya       a cat --n bad art --w 640 --d 1,2        kohya's gen_img and sample prompts
invokeai    "a cat" -n4 -S1234 -C7.5                 InvokeAI 2's command line; [words] are the negative prompt
options     a cat --ddim_steps 20 --W 640            this toolkit's options; the prompt can be --prompt, too
jsonl       {"prompt": "a cat", "steps": 20}         a JSON object a line, with the fields of `Job`
csv         prompt,steps                             a header with those names, a row a line
json        ["a cat", {"prompt": "a dog"}]           an array of prompts or of such objects, on any number of lines
toml        [[prompt.subset]]                        kohya's sample prompts
yaml        - prompt: a cat                          a list of prompts or of such mappings

Lines of options beginning with # are comments in kohya and invokeai (there // as well), and nowhere else.
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from ldm.prompts.documents import is_json, is_toml, is_valid_json, is_yaml, read_json, read_toml, read_yaml
from ldm.prompts.files import MAX_LINE, Faults, no_prompt, read_lines, source_name, too_long
from ldm.prompts.lines import Line, numbered
from ldm.prompts.notations import warn_of_lines
from ldm.prompts.options import DIALECTS, Dialect, option_names, warn_of_literal
from ldm.prompts.tables import header_names, is_json_object, read_csv, read_jsonl, unknown_names
from ldm.util import printable

logger = logging.getLogger(__name__)

_SAMPLE = 100  # lines with options from which the dialect is detected


def read_prompt_list(
    source: str | Path | bytes, format: str = "auto", faults: Faults | None = None
) -> list[Line]:
    """Reads the lines of a prompt file, of standard input for "-", or of bytes that were read from there.

    Blank lines are left out, and every value is checked.

    "auto" decides by content:
    1. JSON, TOML and YAML, if the first line that is not blank begins a list in it, JSON lines, if that begins with
       {"name": and CSV, if that line is a header: two or more names, all known, one of them a prompt's. Otherwise
       a file whose name ends in .json, .jsonl, .csv, .tsv, .toml or .yaml is read as that.
    2. Otherwise a line is evidence for a dialect of options if all of it reads as that dialect: it has a prompt,
       and its options are known, follow white space and have values of their types; one of them at least
       is a `--name`, or a letter with a number. Without evidence every line is a literal prompt.
    3. The dialect with the most evidence in the first hundred such lines is the file's, in a tie the first of
       options, a1111, kohya and invokeai. A warning names it.
    4. In such a file, lines with a `--name` that the dialect knows, or a letter with a number, must be right in
       all their options. Others that seem to have an option are literal, with a warning.

    So `--` and `-n` inside a prompt are text; text that reads as an option by chance (Midjourney's --s 250)
    needs "plain".

    Raises one `InputError` with a line for each fault: a line that cannot be read, an unknown option, a wrong type or
    range, a line without a prompt. Given `faults`, it adds them there instead, as long as a line is sound.
    """
    noted = Faults(source_name(source)) if faults is None else faults
    lines = list(read_lines(source, noted))
    found: list[Line] = []
    if any(text and not text.isspace() for text in lines):
        read = _detect(lines, noted.name) if format == "auto" else READERS[format]
        if read not in _DOCUMENTS:
            lines = [_no_longer(number, text, noted) for number, text in enumerate(lines, 1)]
        found = list(read(lines, noted))
    if faults is None or not found:
        noted.raise_any()
    if not found:
        raise no_prompt(noted.name)
    return found


def is_whole(first: bytes, format: str) -> bool:
    """Returns whether a list with this first line is one document or table, whose lines mean nothing alone."""
    if format != "auto":
        return format in ("csv", "json", "toml", "yaml")
    text = first.decode("utf-8", "replace").removeprefix("\ufeff").strip()
    return bool(text) and (_document(text, [text]) in ("csv", "json", "yaml") or is_toml(text, ["a = 1"]))


def _no_longer(number: int, text: str, faults: Faults) -> str:
    """Returns a line of a list; empty, with a fault, if only a document may have such a long one."""
    if len(text) <= MAX_LINE:
        return text
    faults.add(number, too_long())
    return ""


Reader = Callable[[Sequence[str], Faults], Iterable[Line]]


def _plain(lines: Sequence[str], faults: Faults) -> Iterator[Line]:
    return (Line(number, text) for number, text in numbered(lines))


READERS: Mapping[str, Reader] = {
    "plain": _plain,
    "jsonl": read_jsonl,
    "csv": read_csv,
    "json": read_json,
    "toml": read_toml,
    "yaml": read_yaml,
    **{dialect.name: dialect.read for dialect in DIALECTS},
}
FORMATS = ("auto", *READERS)
_DOCUMENTS = (read_json, read_jsonl)
_BY_ENDING: Mapping[str, str] = {
    ".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "csv", ".toml": "toml",
    ".yaml": "yaml", ".yml": "yaml",
}  # fmt: skip


def _detect(lines: Sequence[str], source: str) -> Reader:
    """Detects the reader for lines whose format is not given; see `read_prompt_list` for the rule."""
    first = next(numbered(lines))[1]
    if format := _document(first, lines) or _BY_ENDING.get(Path(source).suffix.lower()):
        logger.info("%s is read as %s", source, "JSON lines" if format == "jsonl" else format.upper())
        return READERS[format]
    if (names := header_names(first)) and (unknown := unknown_names(names)):
        logger.warning(
            "%s is not read as CSV, since there is no column %s", source, printable(unknown[0])[:80]
        )
    evidence = list(itertools.islice(_evidence(lines), _SAMPLE))
    if not evidence:
        return _plain_but_warn
    counts = Counter(dialect.name for _, _, dialects in evidence for dialect in dialects)
    dialect = max(DIALECTS, key=lambda dialect: counts[dialect.name])
    number, name = next((number, name) for number, name, dialects in evidence if dialect in dialects)
    logger.warning(
        "%s is read as %s (%s in line %d); --prompt_format plain takes every line as it is",
        source, dialect.title, printable(name)[:80], number,
    )  # fmt: skip
    return dialect.read_mixed


def _document(first: str, lines: Sequence[str]) -> str:
    """Returns the format of a list that is not lines of text, by its content; empty if none."""
    if is_json_object(first):
        return "jsonl" if is_valid_json([first]) or not is_valid_json(lines) else "json"
    if is_json(first):
        return "json"
    content = next((text for _, text in numbered(lines) if not text.startswith(("#", "---"))), "")
    if is_toml(content, lines):
        return "toml"
    if is_yaml(content):
        return "yaml"
    names = header_names(first)
    return "csv" if names and not unknown_names(names) else ""


def _evidence(lines: Sequence[str]) -> Iterator[tuple[int, str, list[Dialect]]]:
    """Yields number, an option and the dialects of each line that reads as one or more of them."""
    for number, text in numbered(lines):
        if names := option_names(text):
            dialects = [dialect for dialect in DIALECTS if dialect.is_evidence(text, names)]
            if dialects:
                yield number, names[0], dialects


def _plain_but_warn(lines: Sequence[str], faults: Faults) -> Iterator[Line]:
    named = ((number, option_names(text)) for number, text in numbered(lines))
    warn_of_literal(
        faults.name, [(number, names[0]) for number, names in named if names and names[0].startswith("--")]
    )
    warn_of_lines(faults.name, numbered(lines))
    return _plain(lines, faults)
