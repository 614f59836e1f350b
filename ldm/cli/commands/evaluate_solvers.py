"""`ldm evaluate solvers`: compares solvers and schedules by the number of calls of the model."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from ldm import cli
from ldm.cli.model_options import add_measured_model_options
from ldm.models.diffusion.solvers.names import find_schedule, find_solver
from ldm.models.diffusion.solvers.registry import SOLVERS
from ldm.prompts.lines import MAX_COUNT
from ldm.util import need

T = TypeVar("T")
MAX_CALLS = 998  # of a solver of one call a step, and one for a run

_DESCRIPTION = (
    "Compares solvers and schedules on the bundled model by the number of calls of it: how many images are right, "
    "and how far they are from the solution of the ODE. Writes solvers.csv, solvers.md and solvers.png, row by "
    "row: the same command continues where it was interrupted."
)
_EXAMPLES = (
    "python scripts/evaluate.py solvers",
    "python scripts/evaluate.py solvers --only heun,unipc/karras --calls 10,20 --count 40 --outdir outputs/some",
)


def parser() -> argparse.ArgumentParser:
    """Returns the options of the command."""
    options = cli.make_parser(_DESCRIPTION, "solvers [options]", _EXAMPLES)
    add_measured_model_options(options)
    group = options.add_argument_group("what is compared")
    group.add_argument(
        "--only",
        metavar="NAMES",
        type=_several(_named, "a list of solvers"),
        help="these solvers or solver/schedule, with commas (default: every solver, and the schedules of some)",
    )
    group.add_argument(
        "--calls",
        metavar="N,...",
        type=_several(_calls, f"a list of numbers of 1 to {MAX_CALLS}"),
        help="these numbers of calls (default: 10 and 20, some from 4 to 100)",
    )
    group.add_argument("--scale", metavar="X", type=float, default=7.5, help="guidance scale")
    group.add_argument("--seed", metavar="N", type=int, default=0, help="seed of the first image")
    group.add_argument("--count", metavar="N", type=int, default=32, help="images of each")
    group.add_argument(
        "--compared", metavar="N", type=int, default=8, help="of them, those whose distance is measured"
    )
    group.add_argument("--batch", metavar="N", type=int, default=32, help="images at a time")
    group = options.add_argument_group("output")
    group.add_argument("--outdir", metavar="DIR", type=Path, default=Path("outputs/solvers"), help="folder")
    group.add_argument("--no_plot", action="store_true", help="write no solvers.png, which needs matplotlib")
    cli.add_report_options(options)
    return options


def run(opt: argparse.Namespace) -> int:
    """Measures what is missing, writes the reports, and prints the best at 10 and 20 calls."""
    need(2 <= opt.count <= MAX_COUNT, f"--count is {opt.count}; give 2 to {MAX_COUNT}")
    need(1 <= opt.compared <= opt.count, f"--compared is {opt.compared}; give 1 to --count, {opt.count}")
    need(1 <= opt.batch <= MAX_COUNT, f"--batch is {opt.batch}; give 1 to {MAX_COUNT}")
    from ldm.training.solver_report import as_markdown, best, plot
    from ldm.training.solver_table import CALLS, Cell, Comparison, compare, grid, pairs

    cells = grid()
    if opt.only is not None or opt.calls is not None:
        wanted: list[tuple[str, str]] = opt.only or pairs(cells)
        cells = [Cell(solver, schedule, calls) for calls in opt.calls or CALLS for solver, schedule in wanted]
    chosen = Comparison(**{name: getattr(opt, name) for name in Comparison.__dataclass_fields__})
    measured = compare(chosen, opt.outdir, cells)
    (opt.outdir / "solvers.md").write_text(as_markdown(measured), encoding="utf-8")
    if not opt.no_plot:
        plot(measured, opt.outdir / "solvers")
    for calls in sorted({cell.calls for cell in measured}):
        first = best(measured, calls)[0]
        distance = "" if first.distance is None else f", distance {first.distance:.2f}"
        print(f"{calls:3d} calls: {first.solver}/{first.schedule}  {100 * first.right:.0f} % right{distance}")
    return 0


def _named(text: str) -> tuple[str, str]:
    """Reads SOLVER or SOLVER/SCHEDULE, by any program's names."""
    solver, _, schedule = text.partition("/")
    named = find_solver(solver.strip())
    found = find_schedule(schedule)
    if named is None or found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a solver, or solver/schedule")
    return named.sampler, found or named.schedule or SOLVERS[named.sampler].schedule


def _calls(text: str) -> int:
    value = int(text)
    if not 1 <= value <= MAX_CALLS:
        raise ValueError
    return value


def _several(read: Callable[[str], T], what: str) -> Callable[[str], list[T]]:
    """Returns a reader of values with commas between them."""

    def values(text: str) -> list[T]:
        try:
            return [read(part) for part in text.split(",")]
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}") from None

    return values
