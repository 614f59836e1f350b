"""The table of solvers: what it measures, how it goes on, and what it recommends."""

import numpy as np
import pytest

import scripts.evaluate as evaluate
from ldm.models.diffusion.solvers.registry import SOLVERS
from ldm.training import solver_table
from ldm.training.solver_report import as_markdown, best
from ldm.training.solver_table import Cell, grid, read_cells


@pytest.mark.parametrize("calls", [1, 2, 4, 5, 10, 999])
def test_a_cell_has_as_many_steps_as_its_calls_allow(calls):
    for name, row in SOLVERS.items():
        steps = Cell(name, row.schedule, calls).steps
        assert steps == 1 or row.model_calls(steps) <= calls < row.model_calls(steps + 1)


def test_every_solver_that_needs_no_other_model_is_measured_at_10_and_20_calls():
    cells = grid()
    assert len({cell.key for cell in cells}) == len(cells)
    for calls in (10, 20):
        assert {c.solver for c in cells if c.calls == calls} == SOLVERS.keys() - {"lcm", "tcd", "restart"}


def test_the_best_is_near_the_solution_among_those_as_often_right():
    found = [
        Cell("ddim", "original", 10, 0.90, 0.5),
        Cell("unipc", "uniform", 10, 0.89, 0.1),
        Cell("heun", "uniform", 10, 0.85, 0.2),
        Cell("plms", "original", 10, 0.84, 0.01),
        Cell("euler_a", "uniform", 10, 0.90),
        Cell("lms", "uniform", 20, 1.0, 0.0),
    ]
    names = [cell.solver for cell in best(found, 10)]
    assert names == ["unipc", "heun", "ddim", "euler_a", "plms"]


def test_the_table_has_a_line_a_pair_and_a_column_a_number_of_calls():
    text = as_markdown([Cell("ddim", "original", 10, 0.5, 0.123), Cell("ddim", "original", 4, 0.25, 1.0),
                        Cell("euler_a", "karras", 10, 1.0)])  # fmt: skip
    assert text.splitlines() == [
        "| solver | schedule | 4 | 10 |",
        "|---|---|---|---|",
        "| `ddim` | `original` | 25 (1) | 50 (0.12) |",
        "| `euler_a` | `karras` |  | 100 |",
    ]


@pytest.fixture
def measure(tmp_path, monkeypatch, capsys):
    """Runs the command for two images; returns its exit code, what it printed, and the rows of its file."""
    monkeypatch.setattr(solver_table, "_REFERENCE", solver_table.Job("", sampler="dpmpp_2m", steps=20))

    def run(*options):
        arguments = [
            "--count",
            "2",
            "--compared",
            "2",
            "--no_plot",
            "--device",
            "cpu",
            "--outdir",
            str(tmp_path),
        ]
        code = evaluate.main(["solvers", *arguments, *options])
        text = capsys.readouterr()
        lines = (
            (tmp_path / "solvers.csv").read_text().splitlines() if (tmp_path / "solvers.csv").exists() else []
        )
        return code, text, lines

    return run


@pytest.mark.long
def test_an_interrupted_table_goes_on_and_more_steps_come_nearer(measure, tmp_path):
    assert measure("--only", "Euler", "--calls", "3")[0] == 0
    solution = np.load(tmp_path / "solution.npy")
    code, said, lines = measure("--only", "euler,Euler a Karras,heun", "--calls", "3,8")
    assert code == 0 and lines[0] == "solver,schedule,calls,steps,right,distance"
    assert np.array_equal(np.load(tmp_path / "solution.npy"), solution)
    rows = [line.split(",") for line in lines[1:]]
    assert [row[:4] for row in rows] == [
        ["euler", "uniform", "3", "3"], ["euler_a", "karras", "3", "3"], ["heun", "uniform", "3", "2"],
        ["euler", "uniform", "8", "8"], ["euler_a", "karras", "8", "8"], ["heun", "uniform", "8", "4"],
    ]  # fmt: skip
    assert [bool(row[5]) for row in rows] == [True, False, True] * 2
    assert float(rows[3][5]) < float(rows[0][5]) and float(rows[5][5]) < float(rows[2][5])
    assert (tmp_path / "solvers.md").read_text() == as_markdown(read_cells(tmp_path / "solvers.csv"))
    code, said, _ = measure("--scale", "3")
    assert code == 2 and "begun with other settings; give another --outdir" in said.err


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (["--only", "sketch"], "'sketch' is not a solver, or solver/schedule"),
        (["--only", "ddim/none"], "'ddim/none' is not a solver, or solver/schedule"),
        (["--calls", "10,x"], "'10,x' is not a list of numbers of 1 to 998"),
        (["--calls", "0"], "'0' is not a list of numbers of 1 to 998"),
        (["--compared", "3"], "--compared is 3; give 1 to --count, 2"),
        (["--count", "1"], "--count is 1; give 2 to 100000"),
    ],
)
def test_faults_are_one_line(tmp_path, capsys, options, fault):
    try:
        code = evaluate.main(
            ["solvers", "--count", "2", "--compared", "2", "--outdir", str(tmp_path), *options]
        )
    except SystemExit as left:
        code = left.code
    (line,) = capsys.readouterr().err.splitlines()
    assert code == 2 and fault in line
    assert not list(tmp_path.iterdir())
