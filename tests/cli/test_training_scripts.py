"""The scripts that train and measure: which toolkit they run, and how they refuse."""

import os
import subprocess
import sys

import pytest

import scripts.evaluate as evaluate
import scripts.train as train
from tests.support.paths import ROOT

SCRIPTS = ROOT / "scripts"


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (
            ["evaluate.py", "--count", "1"],
            "error: --count is 1; give 2 to 100000, half for each kind of pair",
        ),
        pytest.param(
            ["train.py", "text", "--base", "none.yaml"],
            "error: there is no config none.yaml",
            marks=pytest.mark.slow,
        ),
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


@pytest.fixture
def refusal(tmp_path, monkeypatch, capsys):
    """The error of a script that refuses its options before a model is read or anything is trained."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ldm.training.evaluate.load_model", None)
    (tmp_path / "text.txt").write_text("x")

    def run(script, *options):
        try:
            code = script.main([*options])
        except SystemExit as left:
            code = left.code
        assert code == 2
        (line,) = capsys.readouterr().err.replace("no GPU found; using the CPU\n", "").splitlines()
        return line

    return run


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--sampler", "plsm"], "did you mean plms?"),
        (["--batch", "0"], "--batch is 0; give 1"),
        (["--steps", "0"], "--steps is 0; give a whole number from 1 to 999"),
        (["--size", "100"], "--size is 100; give a multiple of 8"),
        (["--seed", "-1"], "--seed is -1; give"),
        (["--sheet", "none/x.png"], "none does not exist; give --sheet in a folder that exists"),
        (["--sheet", "x.doc"], "--sheet x.doc: end its name in .png"),
        (["--judge", "none.pt"], "none.pt does not exist; give another with --judge"),
        (["--judge", "text.txt"], "text.txt is not a file that a stage has saved"),
        (["--ckpt", "none.ckpt"], "none.ckpt does not exist; give another with --ckpt"),
        (["--countt", "4"], "did you mean --count?"),
    ],
    ids=" ".join,
)
def test_evaluate_refuses_before_it_draws(refusal, options, said):
    assert said in refusal(evaluate, *options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["training.steps=2"], "unknown setting training.steps; did you mean training.optimisation.steps?"),
        (["training.batchsize=2"], "did you mean training.batch_size?"),
        (["zzz=2"], "unknown setting zzz; choose from data.folder, "),
        (["training.crop"], "training.crop is not a change; write SETTING=VALUE"),
        (["training.batch_size=0"], "training.batch_size is 0; give a whole number of 1 or more"),
        (["training.kl_weight=small"], "training.kl_weight is small; give a number of 0 or more"),
        (["--max_time", "5m"], "--max_time is 5m; write DD:HH:MM:SS"),
        (["--logdir", "text.txt/logs"], "--logdir text.txt/logs cannot be written to"),
        (["--resume"], "logs/shapes/autoencoder/last.ckpt does not exist"),
        (
            ["--base", "text.txt"],
            "the config of autoencoder has no training.optimisation; give another with --base",
        ),
    ],
    ids=" ".join,
)
def test_train_refuses_before_it_works(refusal, monkeypatch, options, said):
    monkeypatch.setattr("ldm.training.stages.STAGES", {})
    assert said in refusal(train, "autoencoder", *options)


def test_evaluate_works_from_any_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert (
        evaluate.main(["--count", "2", "--steps", "1", "--device", "cpu", "--quiet", "--sheet", "s.png"]) == 0
    )
    shown = capsys.readouterr()
    assert [line.split()[:2] for line in shown.out.splitlines()] == [["fresh", "n=1"], ["heldout", "n=1"]]
    assert (shown.err, [path.name for path in tmp_path.iterdir()]) == ("", ["s.png"])


def test_training_advertises_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    changes = ["training.optimisation.steps=1", "training.batch_size=2", "run.validate_steps=null"]
    assert train.main(["text", *changes, "--logdir", "logs", "--quiet"]) == 0
    assert (tmp_path / "logs/text.pt").is_file()
    assert capsys.readouterr().err == ""
