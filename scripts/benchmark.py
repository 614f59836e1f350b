#!/usr/bin/env python
"""Times every phase of making pictures, alone or in turns with another package."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from ldm import cli  # this toolkit's own, whatever else is installed
from ldm.benchmark.harness import add_benchmark_options, benchmark

sys.path.pop(0)  # its parts are found through it from here on; the folder itself may be the user's

EXAMPLES = (
    "python scripts/benchmark.py --sizes 256,512",
    "python scripts/benchmark.py --parts whole --rounds 3 --json samples.jsonl",
    "python scripts/benchmark.py --peers diffusers --precision autocast,full",
)


def parser() -> argparse.ArgumentParser:
    options = cli.make_parser(__doc__ or "", "[options]", EXAMPLES)
    add_benchmark_options(options)
    cli.add_report_options(options)
    return options


def main(argv: Sequence[str] | None = None) -> int:
    return cli.main(parser(), benchmark, argv)


if __name__ == "__main__":
    sys.exit(main())
