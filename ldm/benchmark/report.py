"""Samples of a benchmark, as JSON lines and as tables: medians, ranges and ratios."""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from ldm.benchmark.options import PEERS
from ldm.benchmark.process import Process
from ldm.benchmark.subjects import Setting
from ldm.util import printable

# in the order of the table
PHASES = (
    "import", "load", "compile", "text", "encode", "first step", "step", "unet", "decode", "png",
    "start to first step", "whole run",
)  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """The measurement of one subject in one round: the seconds of each phase, and the peak bytes of memory so far.

    `load` is the machine's load average after it, None where there is none.
    """

    subject: str
    size: int
    round: int
    fresh: bool
    seconds: Mapping[str, Sequence[float]]
    memory: Mapping[str, int]
    load: float | None


class Report:
    """Tables for people, and JSON lines with every raw sample."""

    def __init__(self, json_path: str | None) -> None:
        to_stdout = json_path == "-"
        self._tables: TextIO = sys.stderr if to_stdout else sys.stdout
        self._lines: TextIO | None = sys.stdout if to_stdout else None
        self._path = None if to_stdout else json_path

    def line(self, kind: str, fields: Mapping[str, Any]) -> None:
        """Writes one JSON line."""
        text = json.dumps({"kind": kind, **fields})
        if self._path is not None:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(text + "\n")
        elif self._lines is not None:
            print(text, file=self._lines, flush=True)

    def text(self, line: str) -> None:
        """Writes one line for people."""
        print(printable(line.rstrip()), file=self._tables, flush=True)

    def title(self, line: str) -> None:
        """Writes one line for people, after an empty line."""
        self.text("")
        self.text(line)


def ratios(samples: Sequence[Sample], phase: str, ours: str, peer: str) -> list[float]:
    """Returns our median time in a phase over the peer's, round by round."""
    medians = {
        (s.subject, s.round): statistics.median(s.seconds[phase]) for s in samples if s.seconds.get(phase)
    }
    rounds = sorted({number for _, number in medians})
    return [
        medians[ours, r] / medians[peer, r] for r in rounds if (ours, r) in medians and (peer, r) in medians
    ]


def print_report(report: Report, samples: Sequence[Sample], names: Sequence[str], size: int) -> None:
    """Reports every sample as a line, and a table of phases by subject."""
    for sample in samples:
        report.line("sample", asdict(sample))
    how = "fresh processes" if samples[0].fresh else "processes that live on"
    report.title(f"{size}x{size}, {how}, seconds: median (min, interquartile range)")
    report.text("".join(f"{head:<32}" for head in ("", *names)))
    for phase in PHASES:
        cells = [_cell(_times(samples, phase, name)) for name in names]
        if any(cells):
            report.text("".join(f"{cell:<32}" for cell in (phase, *cells)))
    for kind in samples[0].memory:
        peaks = [max(s.memory[kind] for s in samples if s.subject == name) / 2**30 for name in names]
        report.text("".join(f"{cell:<32}" for cell in (f"peak {kind}", *(f"{p:.2f} GiB" for p in peaks))))
    ours = [name for name in names if name.startswith("ours ")]
    pairs = list(itertools.product(ours, names[len(ours) :]))
    for one, other in pairs or [(name, ours[0]) for name in ours[1:]]:
        _tell_ratios(report, samples, one, other, size)


def _times(samples: Sequence[Sample], phase: str, subject: str) -> list[float]:
    """Returns all times of a subject in a phase, over all rounds."""
    return [seconds for s in samples if s.subject == subject for seconds in s.seconds.get(phase, ())]


def _cell(times: Sequence[float]) -> str:
    if not times:
        return ""
    low, _, high = statistics.quantiles(times, n=4) if len(times) > 1 else (times[0],) * 3
    return f"{statistics.median(times):.4f} ({min(times):.4f}, {high - low:.4f})"


def _tell_ratios(report: Report, samples: Sequence[Sample], ours: str, peer: str, size: int) -> None:
    report.title(f"time of {ours} / {peer}, by round (below 1: {ours} is faster)")
    for phase in PHASES:
        if values := ratios(samples, phase, ours, peer):
            middle, worst = statistics.median(values), max(values)
            best = min(_times(samples, phase, ours)) / min(_times(samples, phase, peer))
            what = {"phase": phase, "size": size, "ours": ours, "peer": peer, "fresh": samples[0].fresh}
            figures = {"median": middle, "worst": worst, "of minima": best}
            report.line("ratio", {**what, **figures, "rounds": values})
            listed = "  ".join(f"{name} {value:.3f}" for name, value in figures.items())
            report.text(f"{phase:<22}{listed}  rounds {' '.join(f'{value:.3f}' for value in values)}")


def print_errors(
    opt: argparse.Namespace,
    report: Report,
    settings: Sequence[Setting],
    processes: Mapping[str, Process],
    size: int,
    scratch: Path,
) -> None:
    """Reports the distance of each subject from our float32 results."""
    reference = scratch / f"reference-{size}.pt"
    fields = {"size": size, "steps": opt.steps, "reference": str(reference)}
    if not reference.exists():
        with Process(replace(settings[0], precision="full", compiled=False)) as process:
            process.ask("load", {})
            process.ask("check", fields)
    report.title(f"{size}x{size}: distance from our float32 results (relative L2)")
    for setting, (name, process) in zip(settings, processes.items(), strict=True):
        if setting.subject in PEERS and PEERS[setting.subject].closed:
            report.text(f"{name:<32}not compared: it takes no noise and gives no latents")
            continue
        error = process.ask("check", fields)["error"]
        report.line("error", {"subject": name, "size": size, "steps": opt.steps, **error})
        figures = ", ".join(f"{key} {value:.2e}" for key, value in error.items())
        report.text(f"{name:<32}{figures}")


def facts_line(name: str, facts: Mapping[str, Any], subject: str, recipe: str) -> str:
    listed = {key: value for key, value in facts.items() if value not in (None, {})}
    if subject != "ours":
        listed["layout"] = recipe
    return f"{name}: " + ", ".join(f"{key} {value}" for key, value in listed.items())
