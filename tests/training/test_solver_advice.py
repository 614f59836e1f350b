"""The advice of --help and the page's table are those of the measured comparison of solvers."""

import pytest

from ldm.fields import FIELDS
from ldm.models.diffusion.solvers.registry import RECOMMENDED
from ldm.training.solver_report import as_markdown, best
from ldm.training.solver_table import grid, read_cells
from tests.support.paths import ROOT

FOLDER = ROOT / "ldm/models/diffusion"


@pytest.fixture(scope="module")
def cells():
    return read_cells(FOLDER / "solvers.csv")


@pytest.mark.parametrize("calls", [10, 20])
def test_the_advice_is_the_best_of_the_table(cells, calls):
    winner = best(cells, calls)[0]
    assert RECOMMENDED[calls] == (winner.solver, winner.schedule)
    (sampler,) = (row for row in FIELDS if row.name == "sampler")
    assert f"{winner.solver}/{winner.schedule}" in sampler.help


def test_every_solver_is_compared_at_10_and_20_calls(cells):
    wanted = {cell.key for cell in grid() if cell.calls in (10, 20)}
    assert wanted <= {cell.key for cell in cells}


def test_the_page_has_the_whole_table(cells):
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    shown = page.partition("<!-- solvers: begin -->\n")[2].partition("<!-- solvers: end -->")[0]
    assert shown == as_markdown(cells)


def test_the_readme_has_figures_of_the_table(cells):
    by_key = {cell.key: cell for cell in cells}
    shown = [("ddim", "karras"), ("ddim", "original"), ("plms", "original"), ("dpm_solver", "original")]
    shown += [("euler", "uniform"), ("dpmpp_2m", "uniform")]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for calls in (10, 20):
        found = [by_key[(*pair, calls)] for pair in shown]
        entries = " | ".join(f"{100 * cell.right:.0f} % ({cell.distance:.2f})" for cell in found)
        assert f"| {calls} | {entries} |" in text
