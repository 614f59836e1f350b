"""Prompt lists in the dialects of several programs: lines with options of their own, JSON lines, CSV -> jobs.

plain       every line is a prompt, as it is
a1111       --prompt a cat --steps 20                AUTOMATIC1111's "prompts from file" script
kohya       a cat --n bad art --w 640 --d 1,2        kohya's gen_img and sample prompts
invokeai    "a cat" -n4 -S1234 -C7.5                 InvokeAI 2's command line; [words] are the negative prompt
options     a cat --ddim_steps 20 --W 640            this tool's own options; the prompt can be --prompt, too
jsonl       {"prompt": "a cat", "steps": 20}         a JSON object a line, with the fields of `Job`
csv         prompt,steps                             a header with those names, a row a line

Lines of options beginning with # are comments in kohya and invokeai (there // as well), and nowhere else.
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from ldm.prompts.files import Faults, no_prompt, read_lines, source_name
from ldm.prompts.lines import Line, numbered
from ldm.prompts.options import DIALECTS, Dialect, option_names, warn_of_literal
from ldm.prompts.tables import header_names, is_json_object, read_csv, read_jsonl, unknown_names
from ldm.util import printable

logger = logging.getLogger(__name__)

_SAMPLE = 100  # lines with options that are looked at to tell the dialect


def read_prompt_list(source: str | Path, format: str = "auto", faults: Faults | None = None) -> list[Line]:
    """The lines of a prompt file, or of standard input for "-", blank ones left out, every value checked.

    "auto" decides by content:
    1. JSON lines, if the first line that is not blank begins with {"name": and CSV, if that line is a header:
       two or more names, all known, `prompt` among them.
    2. Otherwise a line is evidence for a dialect of options if all of it reads as that dialect: it has a prompt,
       and its options are known, stand behind white space and have values of their types; one of them at least
       is a `--name`, or a letter with a number. Without evidence every line is a prompt, as it is.
    3. The dialect with the most evidence in the first hundred such lines is the file's, in a tie the first of
       options, a1111, kohya and invokeai. A warning names it.
    4. In such a file, lines with a `--name` that the dialect knows, or a letter with a number, must be right in
       all their options. Others that hold what looks like an option stay literal, and a warning says so.

    So `--` and `-n` inside a prompt stay text; text that reads as an option by chance (Midjourney's --s 250)
    needs "plain".

    Raises one `InputError` with a line for each fault: what cannot be read, an unknown option, a wrong type or
    range, a line without a prompt. Given `faults`, it adds them there instead, as long as a line is sound.
    """
    noted = Faults(source_name(source)) if faults is None else faults
    lines = list(read_lines(source, noted))
    found: list[Line] = []
    if any(text and not text.isspace() for text in lines):
        read = _detect(lines, noted.name) if format == "auto" else READERS[format]
        found = list(read(lines, noted))
    if faults is None or not found:
        noted.raise_any()
    if not found:
        raise no_prompt(noted.name)
    return found


Reader = Callable[[Sequence[str], Faults], Iterable[Line]]


def _plain(lines: Sequence[str], faults: Faults) -> Iterator[Line]:
    return (Line(number, text) for number, text in numbered(lines))


READERS: Mapping[str, Reader] = {
    "plain": _plain,
    "jsonl": read_jsonl,
    "csv": read_csv,
    **{dialect.name: dialect.read for dialect in DIALECTS},
}
FORMATS = ("auto", *READERS)


def _detect(lines: Sequence[str], source: str) -> Reader:
    """The reader for lines whose format nobody named; see `read_prompt_list` for the rule."""
    first = next(numbered(lines))[1]
    if is_json_object(first):
        logger.info("%s is read as JSON lines", source)
        return read_jsonl
    if names := header_names(first):
        if not (unknown := unknown_names(names)):
            logger.info("%s is read as CSV", source)
            return read_csv
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


def _evidence(lines: Sequence[str]) -> Iterator[tuple[int, str, list[Dialect]]]:
    """Number, an option and the dialects of each line that reads as one or more of them."""
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
    return _plain(lines, faults)
