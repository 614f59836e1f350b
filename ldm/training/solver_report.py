"""Evaluates a table of solvers: its best at a number of calls, the table as text, and its plot."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from ldm.plots import new_figure, save_figure
from ldm.training.solver_table import Cell, pairs
from ldm.util import InputError

_CLOSE = 0.05  # shares of right images that differ by less are a matter of chance
# lines of the plot, as far as they were measured: what people know, and the best
_SHOWN = (
    ("ddim", "original"),
    ("ddim", "karras"),
    ("plms", "original"),
    ("dpm_solver", "original"),
    ("euler", "uniform"),
    ("euler_a", "uniform"),
    ("dpmpp_2m", "karras"),
    ("unipc", "uniform"),
)


def best(cells: Iterable[Cell], calls: int) -> list[Cell]:
    """Returns the cells of so many calls, the best first.

    Those whose share of right images is within 5 points of the highest come first, in the order of their distances
    from the solution; the rest follow by their shares.
    """
    found = [cell for cell in cells if cell.calls == calls]
    if not found:
        raise InputError(f"the table has nothing at {calls} calls")
    highest = max(cell.right for cell in found)

    def rank(cell: Cell) -> tuple[float, ...]:
        close = cell.right >= highest - _CLOSE - 1e-9
        if close and cell.distance is not None:
            return 0, cell.distance
        return (1 if close else 2), -cell.right

    return sorted(found, key=rank)


def as_markdown(cells: Sequence[Cell]) -> str:
    """Returns the table: a line a solver and schedule, a column a number of calls, "right % (distance)" in each."""
    columns = sorted({cell.calls for cell in cells})
    by_key = {cell.key: cell for cell in cells}
    lines = [
        "| solver | schedule | " + " | ".join(map(str, columns)) + " |",
        "|---" * (len(columns) + 2) + "|",
    ]
    for solver, schedule in pairs(cells):
        entries = [_entry(by_key.get((solver, schedule, calls))) for calls in columns]
        lines.append(f"| `{solver}` | `{schedule}` | " + " | ".join(entries) + " |")
    return "\n".join(lines) + "\n"


def _entry(cell: Cell | None) -> str:
    if cell is None:
        return ""
    right = f"{100 * cell.right:.0f}"
    return right if cell.distance is None else f"{right} ({cell.distance:.2g})"


def plot(cells: Sequence[Cell], path: Path) -> None:
    """Writes `path`.png, a plot of both figures against the number of calls: a few lines if they are there, else all.

    Raises `InputError` without matplotlib.
    """
    lines: dict[tuple[str, str], list[Cell]] = {}
    for cell in sorted(cells, key=lambda cell: cell.calls):
        lines.setdefault((cell.solver, cell.schedule), []).append(cell)
    shown = [key for key in _SHOWN if key in lines] or list(lines)
    figure = new_figure(9, 3.6)
    left, right = figure.subplots(1, 2)
    for solver, schedule in shown:
        line = lines[solver, schedule]
        calls = [cell.calls for cell in line]
        (drawn,) = left.plot(calls, [100 * cell.right for cell in line], ".-", label=f"{solver}/{schedule}")
        if line[0].distance is not None:
            right.plot(calls, [cell.distance for cell in line], ".-", color=drawn.get_color())
    left.set(xlabel="calls of the model", ylabel="right images, %", xscale="log")
    right.set(xlabel="calls of the model", ylabel="distance to the solution", xscale="log", yscale="log")
    ticks = sorted({cell.calls for cell in cells})
    for axes in (left, right):
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    left.legend(fontsize="small")
    save_figure(figure, path)
