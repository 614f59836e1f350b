"""`ldm benchmark`: times every phase of generating images."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ldm import cli
from ldm.benchmark.harness import benchmark
from ldm.benchmark.options import add_benchmark_options

_DESCRIPTION = "Times every phase of generating images, alone or in turns with another package."
_EXAMPLES = (
    "python scripts/benchmark.py --sizes 256,512",
    "python scripts/benchmark.py --parts whole --rounds 3 --json samples.jsonl",
    "python scripts/benchmark.py --peers diffusers --precision autocast,full",
)


def parser() -> argparse.ArgumentParser:
    """Returns the options of the command."""
    options = cli.make_parser(_DESCRIPTION, "[options]", _EXAMPLES)
    add_benchmark_options(options)
    cli.add_report_options(options)
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command with these arguments, or those of the process; returns its exit code."""
    return cli.main(parser(), benchmark, argv)
