"""The scripts that train and measure: which toolkit they run, and how they refuse."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (
            ["evaluate.py", "--count", "1"],
            "error: --count is 1; give 2 to 100000, half for each kind of pair",
        ),
        (["train.py", "text", "--base", "none.yaml"], "error: there is no config none.yaml"),
    ],
)
def test_faults_are_one_line_even_beside_a_foreign_toolkit_of_the_same_name(tmp_path, arguments, fault):
    (tmp_path / "ldm").mkdir()
    (tmp_path / "ldm" / "__init__.py").write_text("raise SystemExit(77)")
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / arguments[0]), *arguments[1:]],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr.splitlines()) == (2, [fault])
