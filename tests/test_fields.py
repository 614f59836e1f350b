"""A field of a job is a line of `Job`, a row of the table, and its use: everything else reads the row."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ldm.fields import DEFAULTS, FIELDS, SETTINGS
from ldm.job_values import values_of_options
from tests.support.paths import ROOT

_LINE = '    prompt_syntax: Literal["plain", "a1111"] = "plain"\n'
_ROW = '    Field("loras", {"high": MAX_LORAS}),\n'
_NEW_ROW = (
    '    Field("toy", {"low": 0, "high": 9}, "toy_level", "sampling", "N", "a toy", label="Toy level"),\n'
)
_RUNS = """
import json, sys
from ldm.cli.commands.generate import txt2img
from ldm.cli.commands.replay import main
from ldm.metadata.infotext import job_from_infotext
from ldm.metadata.record import read_record
from PIL import Image

common = "--ddim_steps 1 --W 32 --H 32 --skip_grid --quiet --n_iter 1 --n_samples 1".split()

def toys(folder):
    texts = [Image.open(file).text for file in sorted(folder.glob("*.png"))]
    infos = [job_from_infotext(text["parameters"]).toy for text in texts]
    return infos, [read_record(text["ldm"]).job.toy for text in texts]

def made(name, *options):
    folder = root / name
    assert txt2img([*common, "--outdir", str(folder), *options]) == 0
    return toys(folder / "samples")

from pathlib import Path
root = Path(sys.argv[1])
(root / "lines.txt").write_text("a cube --toy_level 4\\na cone\\n")
(root / "lines.jsonl").write_text('{"prompt": "a cube", "toy": 5}\\n')
results = {
    "option": made("option", "--prompt", "a cube", "--toy-level", "3"),
    "list": made("list", "--from-file", str(root / "lines.txt")),
    "jsonl": made("jsonl", "--from-file", str(root / "lines.jsonl")),
    "sweep": made("sweep", "--prompt", "a cube", "--sweep", "toy=0..2"),
}
file = str(root / "option/samples/00000.png")
assert main([file, "--outdir", str(root / "same"), "--quiet"]) == 0
assert main([file, "--outdir", str(root / "other"), "--quiet", "--toy_level", "7"]) == 0
results["replay"], results["changed"] = toys(root / "same"), toys(root / "other")
assert main([file, "--show"]) == 0
print(json.dumps(results))
print(txt2img([*common, "--outdir", str(root / "none"), "--toy_level", "10"]))
"""


def test_the_table_has_the_fields_of_a_job_and_of_its_starting_image() -> None:
    assert set(SETTINGS) == {row.name for row in FIELDS} == set(DEFAULTS) - {"init"}


def test_options_give_values_to_fields() -> None:
    options = {"ddim_steps": 5, "plms": True, "init_img": ["a.png", "b.png"], "no_paste": True, "mask": None}
    expected = {"steps": 5, "sampler": "plms", "init.image": "a.png", "paste": False}
    assert values_of_options({**options, "posterior_mean": False, "outdir": "x"}) == expected


@pytest.mark.slow
def test_a_new_field_is_set_by_option_list_sweep_and_replay_and_kept_in_the_image(tmp_path: Path) -> None:
    """In a copy of the package with one more line in `Job` and one more row."""
    shutil.copytree(ROOT / "ldm", tmp_path / "code/ldm", ignore=shutil.ignore_patterns("__pycache__"))
    for folder in ("configs", "models"):
        os.symlink(ROOT / folder, tmp_path / "code" / folder)
    for name, old, new in (
        ("job.py", _LINE, f"{_LINE}    toy: int = 0\n"),
        ("fields.py", _ROW, f"{_NEW_ROW}{_ROW}"),
    ):
        file = tmp_path / "code/ldm" / name
        text = file.read_text()
        assert text.count(old) == 1
        file.write_text(text.replace(old, new))
    done = subprocess.run(
        [sys.executable, "-c", _RUNS, str(tmp_path)],
        cwd=tmp_path / "code", capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "code")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results, code = done.stdout.splitlines()[-2:]
    expected = {
        "option": [3],
        "list": [4, 0],
        "jsonl": [5],
        "sweep": [0, 1, 2],
        "replay": [3],
        "changed": [7],
    }
    assert json.loads(results) == {name: [toys, toys] for name, toys in expected.items()}
    assert "--toy_level 3" in done.stdout
    assert code == "2" and "--toy_level is 10; give a whole number from 0 to 9" in done.stderr
