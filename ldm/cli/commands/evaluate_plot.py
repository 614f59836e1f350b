"""`ldm evaluate plot`: draws Fréchet distance against text-image score."""

from __future__ import annotations

import argparse
from pathlib import Path

from ldm import cli
from ldm.util import need, printable

_EXAMPLES = (
    "python scripts/evaluate.py plot outputs/evaluation",
    "python scripts/evaluate.py plot outputs/a outputs/b --y kid --out curves",
)


def parser() -> argparse.ArgumentParser:
    """Returns the options of the command."""
    description = (
        "Draws the results of folders: a curve for each variant, a point for each setting, as PNG and SVG."
    )
    options = cli.make_parser(description, "plot FOLDER [FOLDER ...] [options]", _EXAMPLES)
    options.add_argument("folders", metavar="FOLDER", nargs="+", help="folders with results.jsonl")
    group = options.add_argument_group("plot")
    group.add_argument("--x", metavar="METRIC", default="", help="across (default: clip or answers)")
    group.add_argument("--y", metavar="METRIC", default="", help="up (default: fid, fd_dinov2 or kid)")
    group.add_argument(
        "--out",
        metavar="NAME",
        help="the plot's path without its ending (default: curve, in the first folder)",
    )
    cli.add_report_options(options)
    return options


def run(opt: argparse.Namespace) -> int:
    """Draws the plot, and prints where it is and the best point of each curve."""
    draw([Path(folder) for folder in opt.folders], opt.out, opt.x, opt.y)
    return 0


def draw(folders: list[Path], out: str | None, x: str = "", y: str = "") -> None:
    """Draws the results of folders."""
    from ldm.evaluation.plots import curves, plot
    from ldm.evaluation.results import LINES, read_results

    for folder in folders:
        need(
            (folder / LINES).is_file(),
            f"{printable(folder)} has no {LINES}; run `evaluate.py score {printable(folder)}`",
        )
    results = [result for folder in folders for result in read_results(folder / LINES)]
    horizontal, vertical, found = curves(results, x, y)
    for path in plot(results, Path(out) if out else folders[0] / "curve", x, y):
        print(printable(path))
    for curve in found:
        i = curve.best
        x_there, y_there = curve.x[i].value, curve.y[i].value
        name, where = printable(curve.name) or "images", curve.labels[i] or "-"
        print(
            f"{name}: the lowest {vertical} is {y_there:.4g} at {where}, where {horizontal} is {x_there:.4g}"
        )
