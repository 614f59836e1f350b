"""Results: JSON lines, CSV and a Markdown table, each figure with all that it depends on."""

from __future__ import annotations

import csv
import io
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ldm.evaluation.bootstrap import Estimate
from ldm.files import read_side_file, written_whole
from ldm.util import InputError, is_mapping, printable

LINES, TABLE, MARKDOWN = "results.jsonl", "results.csv", "results.md"
_MAX_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Result:
    """One figure: `value` with the ends of its interval, of `images` images of the set `images_of`.

    `network`, `weights` (SHA-256) and `resize` are those of its features; `references` are named with their number
    and SHA-256. `settings` are those of the point, `model` is the checkpoint's name and hash, if images record it.
    """

    images_of: str
    metric: str
    value: float
    low: float | None
    high: float | None
    images: int
    variant: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    network: str = ""
    weights: str = ""
    resize: str = ""
    references: str = ""
    reference_images: int = 0
    reference_sha256: str = ""
    model: str = ""
    note: str = ""
    command: str = ""
    versions: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def key(self) -> tuple[str, ...]:
        """The figure's identity: a newer one with an equal key replaces it."""
        return self.images_of, self.metric, self.network, self.resize, self.references

    @property
    def estimate(self) -> Estimate:
        nan = float("nan")
        return Estimate(
            self.value, nan if self.low is None else self.low, nan if self.high is None else self.high
        )


def versions() -> dict[str, str]:
    """Returns the versions of what figures depend on."""
    import numpy
    import PIL
    import torch

    from ldm import __version__

    return {
        "ldm": __version__, "torch": str(torch.__version__), "numpy": numpy.__version__, "pillow": PIL.__version__,
        "python": platform.python_version(),
    }  # fmt: skip


def read_results(path: Path) -> list[Result]:
    """Reads JSON lines of results; InputError names a damaged line."""
    found: list[Result] = []
    names = {item.name for item in fields(Result)}
    text = read_side_file(path, _MAX_BYTES).decode("utf-8", "replace")
    for number, line in enumerate(text.splitlines(), 1):
        try:
            row: dict[str, Any] = json.loads(line)
            found.append(Result(**{name: value for name, value in row.items() if name in names}))
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            reason = printable(error)[:80]
            raise InputError(
                f"{printable(path)}, line {number} is not a result ({reason}); run `score` again"
            ) from None
    return found


def write_results(folder: Path, new: Sequence[Result]) -> list[Result]:
    """Adds results to those of a folder, in all forms; returns all of them."""
    path = folder / LINES
    old = {result.key: result for result in (read_results(path) if path.exists() else [])}
    merged = [*{**old, **{result.key: result for result in new}}.values()]
    lines = "".join(json.dumps(asdict(result)) + "\n" for result in merged)
    for name, text in ((LINES, lines), (TABLE, as_csv(merged)), (MARKDOWN, as_markdown(merged))):
        with written_whole(folder / name, overwrite=True) as part:
            part.write_text(text, encoding="utf-8", errors="backslashreplace", newline="")
    return merged


def as_csv(results: Sequence[Result]) -> str:
    """Returns results as CSV with a column for each entry; settings and versions in one text each."""
    file = io.StringIO()
    table = csv.writer(file, lineterminator="\n")
    names = [item.name for item in fields(Result)]
    table.writerow(names)
    for result in results:
        values = [getattr(result, name) for name in names]
        table.writerow([_joined(value) if is_mapping(value) else value for value in values])
    return file.getvalue()


def as_markdown(results: Sequence[Result]) -> str:
    """Returns a table with a row for each set of images and a column for each metric, and its sources."""
    sets = list(dict.fromkeys(result.images_of for result in results))
    metrics = list(dict.fromkeys(_title(result) for result in results))
    cell = {(result.images_of, _title(result)): str(result.estimate) for result in results}
    label = {result.images_of: _label(result) for result in results}
    rows = [["images", *metrics], ["---"] * (1 + len(metrics))]
    rows += [[label[name], *(cell.get((name, metric), "") for metric in metrics)] for name in sets]
    table = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    return f"{table}\nIntervals are of 95 %.\n{_sources(results)}"


def _sources(results: Sequence[Result]) -> str:
    lines = {
        f"- {result.metric}: {result.images} images"
        + (f" of {printable(result.model)}" if result.model else "")
        + (f"; network {result.network}" if result.network else "")
        + (f" [{result.weights[:10]}]" if result.weights else "")
        + (f", resized by {result.resize}" if result.resize else "")
        + (
            f"; references {printable(result.references)}, {result.reference_images} images"
            if result.references
            else ""
        )
        + (f" [{result.reference_sha256[:10]}]" if result.reference_sha256 else "")
        + (f"; {result.note}" if result.note else "")
        for result in results
    }
    commands = {
        f"- `{printable(result.command)}`; {_joined(result.versions)}" for result in results if result.command
    }
    return "\n" + "\n".join([*sorted(lines), *sorted(commands)]) + "\n"


def _title(result: Result) -> str:
    return f"{result.metric} ({result.network})" if result.network else result.metric


def _label(result: Result) -> str:
    settings = _joined(result.settings)
    named = f"{result.variant} {settings}".strip() if result.variant else result.images_of
    return printable(named).replace("|", "/")


def _joined(values: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in values.items()
    )
