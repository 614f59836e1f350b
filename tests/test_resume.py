"""Runs that are broken off and gone on with: in the end every byte is as if nothing had happened."""

import errno
import json
import os
import random
import signal
import sys
import tempfile
import time
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import scripts.txt2img as txt2img
from ldm.images.grid import _Page
from ldm.job import Init, Job
from ldm.pipeline import Pipeline
from tests.nursery import Nursery
from tests.test_output import draw, in_batches, make_jobs, tree

ROOT = Path(__file__).parent.parent
TINY = ["--device", "cpu", "--ddim_steps", "2", "--quiet", "--W", "64", "--H", "64"]
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def images(files):
    """The files but for the run file, which says of a broken run which of its grids were unfinished."""
    return {name: data for name, data in files.items() if not name.endswith(".json")}


def rewrite(path, **made_from):
    content = json.loads(path.read_text())
    content["made_from"].update(made_from)
    path.write_text(json.dumps(content))


# --- without a model -----------------------------------------------------------------------------------------


def test_a_broken_run_ends_as_an_unbroken_one(tmp_path):
    jobs, batches = make_jobs(11), in_batches(11, 2)
    draw(tmp_path / "whole", jobs, batches)
    for stop in range(1, 6):
        folder = tmp_path / str(stop)
        assert draw(folder, jobs, batches, stop_after=stop)[0] == stop
        assert (folder / "grid-0000.png").exists()
        assert draw(folder, jobs, batches, resume=True)[0] == 6 - stop
        assert images(tree(folder)) == images(tree(tmp_path / "whole"))


def test_a_batch_that_lacks_one_image_is_made_again_and_only_that_is_written(tmp_path):
    jobs, batches = make_jobs(6), in_batches(6, 3)
    draw(tmp_path, jobs, batches)
    before = tree(tmp_path)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("samples/*.png")}
    (tmp_path / "samples/00004.png").unlink()
    made, output = draw(tmp_path, jobs, batches, resume=True)
    assert (made, output.existing) == (1, 5)
    assert tree(tmp_path) == before
    assert all(path.stat().st_mtime_ns == at for path, at in kept.items() if path.stem != "00004")


def test_what_is_made_again_is_compared(tmp_path, caplog):
    jobs = make_jobs(3)
    draw(tmp_path, jobs, [[0, 1, 2]])
    (tmp_path / "samples/00000.png").unlink()
    Image.new("RGB", (16, 16)).save(tmp_path / "samples/00001.png")
    foreign = (tmp_path / "samples/00001.png").read_bytes()
    draw(tmp_path, jobs, [[0, 1, 2]], resume=True, skip_grid=True)
    assert (tmp_path / "samples/00001.png").read_bytes() == foreign
    assert "00001.png is not what was made again" in caplog.text
    assert "00002.png" not in caplog.text


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_verify_makes_damaged_files_again(tmp_path, damage, caplog):
    jobs = make_jobs(4)
    draw(tmp_path, jobs, in_batches(4, 2))
    before, path = tree(tmp_path), tmp_path / "samples/00002.png"
    data = bytearray(path.read_bytes())
    data[-60] ^= 255
    path.write_bytes({"cut": path.read_bytes()[:-200], "flipped": bytes(data), "empty": b""}[damage])
    assert draw(tmp_path, jobs, in_batches(4, 2), resume=True, verify=True)[0] == 1
    assert tree(tmp_path) == before
    assert "00002.png is damaged" in caplog.text


def test_a_grid_that_is_not_the_runs_own_stays(tmp_path, caplog):
    jobs = make_jobs(4)
    draw(tmp_path, jobs, in_batches(4, 2), stop_after=1)
    (tmp_path / "grid-0000.png").write_bytes(b"mine")
    draw(tmp_path, jobs, in_batches(4, 2), resume=True)
    assert (tmp_path / "grid-0000.png").read_bytes() == b"mine"
    assert "stays as it is" in caplog.text


def test_the_newest_run_that_matches_is_gone_on_with(tmp_path):
    one, other = make_jobs(4), make_jobs(4, scale=3.0)
    draw(tmp_path, one, in_batches(4, 2))
    draw(tmp_path, other, in_batches(4, 2), stop_after=1)
    (tmp_path / "samples/00003.png").unlink()
    draw(tmp_path, one, in_batches(4, 2), resume=True)
    assert (tmp_path / "samples/00003.png").exists()
    draw(tmp_path, other, in_batches(4, 2), resume=True)
    assert len(list(tmp_path.glob("samples/*.png"))) == 8


def test_a_run_whose_numbers_went_to_a_later_one_is_refused(tmp_path):
    draw(tmp_path, make_jobs(6), in_batches(6, 2), stop_after=1)
    draw(tmp_path, make_jobs(2, scale=3.0), [[0, 1]])
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=r"a later run .* has the numbers from 2 on"):
        draw(tmp_path, make_jobs(6), in_batches(6, 2), resume=True)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("change", "said"),
    [({"steps": 9}, "steps: 9, now 50"), ({"precision": "bf16"}, "precision: bf16, now full")],
)
def test_a_changed_setting_is_refused_with_both_values(tmp_path, change, said):
    draw(tmp_path, make_jobs(2), [[0, 1]])
    rewrite(tmp_path / "run-00000.json", **change)
    with pytest.raises(ValueError, match=said):
        draw(tmp_path, make_jobs(2), [[0, 1]], resume=True)


def test_other_weights_are_refused(tmp_path):
    draw(tmp_path, make_jobs(2), [[0, 1]])
    path = tmp_path / "run-00000.json"
    path.write_text(path.read_text().replace("ab" * 32, "cd" * 32))
    with pytest.raises(ValueError, match=r"sha256.checkpoint: (cd){28}.*now (ab){28}"):
        draw(tmp_path, make_jobs(2), [[0, 1]], resume=True)


# --- a disk that says no -------------------------------------------------------------------------------------


def fail_nth(monkeypatch, owner, call, n):
    """Makes the n-th call of a function fail as on a full disk; the list tells whether it came to that."""
    real, seen = getattr(owner, call), []

    def maybe(*args, **kwargs):
        seen.append(1)
        if len(seen) == n:
            raise OSError(FULL.errno, FULL.strerror)
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, call, maybe)
    return seen


@pytest.mark.parametrize(
    ("owner", "call"),
    [
        (os, "write"), (os, "fsync"), (os, "link"), (os, "replace"), (os, "open"),
        (Path, "write_text"), (tempfile, "TemporaryFile"), (_Page, "_write_row"),
    ],
)  # fmt: skip
def test_a_full_disk_at_any_moment_harms_nothing(tmp_path, monkeypatch, owner, call):
    jobs, batches = make_jobs(5), in_batches(5, 2)
    draw(tmp_path / "whole", jobs, batches)
    whole = images(tree(tmp_path / "whole"))
    for n in count(1):
        folder = tmp_path / f"{call}{n}"
        with monkeypatch.context() as patch:
            seen = fail_nth(patch, owner, call, n)
            try:
                draw(folder, jobs, batches)
            except (OSError, ValueError) as error:
                assert "No space left" in str(error)
        here = images(tree(folder)) if folder.exists() else {}
        assert all(whole[name] == data for name, data in here.items() if name.startswith("samples"))
        assert not list(folder.rglob("*.part"))
        draw(folder, jobs, batches, resume=True)
        assert images(tree(folder)) == whole
        if len(seen) < n:
            break
    print(f"{call} failed at each of {n - 1} times")
    assert n > 1


# --- the script ----------------------------------------------------------------------------------------------


def script(folder, *options):
    return txt2img.main([*TINY, "--outdir", str(folder), *options])


@pytest.mark.parametrize(
    "options",
    [
        ["--ddim_eta", "0.5"],
        ["--seed_mode", "batch"],
        ["--seed_mode", "batch", "--plms", "--fixed_code"],
        ["--seed_mode", "batch", "--rng", "cpu", "--ddim_eta", "1", "--upscale", "2"],
    ],
)
def test_the_script_goes_on_to_the_same_bytes(tmp_path, options):
    run = ["--n_iter", "3", "--n_samples", "2", "--precision", "full", *options]
    assert script(tmp_path, *run) == 0
    before = tree(tmp_path)
    for gone in ("samples/00005.png", "grid-0000.png"):
        (tmp_path / gone).unlink()
    assert script(tmp_path, *run, "--resume") == 0
    assert tree(tmp_path) == before


@pytest.mark.parametrize("size", ["64", "256"])  # the watermark begins at 256
def test_an_interrupted_sweep_ends_with_the_sheets_of_an_unbroken_one(tmp_path, monkeypatch, size):
    run = [
        "--n_iter",
        "1",
        "--n_samples",
        "2",
        "--sweep",
        "scale=1,4,7",
        "--ddim_steps",
        "1",
        "--W",
        size,
        "--H",
        size,
    ]
    assert script(tmp_path / "whole", *run) == 0
    begin = Pipeline.begin

    def interrupted(*args, **named):
        os.kill(os.getpid(), signal.SIGTERM)
        return begin(*args, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "begin", interrupted)
        assert script(tmp_path / "out", *run) == 128 + signal.SIGTERM
    partial = images(tree(tmp_path / "out"))
    assert script(tmp_path / "out", *run, "--resume") == 0
    whole = images(tree(tmp_path / "whole"))
    assert images(tree(tmp_path / "out")) == whole
    changed = {name for name in whole if partial.get(name) != whole[name]}
    assert "sheet-0000.png" in partial
    assert changed == {
        "grid-0000.png",
        "sheet-0000.png",
        "sheet-0001.png",
        *(f"samples/0000{i}.png" for i in range(2, 6)),
    }


def test_the_script_refuses_an_edited_list(tmp_path, capsys):
    prompts = tmp_path / "list.txt"
    prompts.write_text("a red cube\na blue cube\na green cone\n")
    run = ["--from-file", str(prompts), "--n_iter", "1", "--n_samples", "2"]
    assert script(tmp_path / "out", *run) == 0
    before = tree(tmp_path / "out")
    prompts.write_text("a red cube\na blue ball\na green cone\n")
    assert script(tmp_path / "out", *run, "--resume") == 2
    assert "line 2" in capsys.readouterr().err
    assert script(tmp_path / "out", *run, "--verify") == 2
    assert tree(tmp_path / "out") == before


# --- the noise of skipped batches ----------------------------------------------------------------------------


class Counting:
    """A stream that only notes what is drawn."""

    def __init__(self):
        self.shapes = []

    def draw(self, shape):
        self.shapes.append(tuple(shape))
        return torch.zeros(tuple(shape))

    def skip(self, shape):
        self.shapes.append(tuple(shape))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"sampler": "plms"},
        {"sampler": "dpm_solver"},
        {"eta": 0.7},
        {"upscale": 2.0},
        {"upscale": 2.0, "upscale_strength": 0.0},
        {"init": "plain", "strength": 0.6},
        {"init": "plain", "strength": 0.0},
        {"init": "masked", "strength": 0.6},
        {"init": "masked", "upscale": 2.0},
    ],
)
def test_skipping_a_batch_draws_what_making_it_draws(tiny, tmp_path, fields):
    picture, mask = tmp_path / "picture.png", tmp_path / "mask.png"
    Image.fromarray(np.full((64, 64, 3), 100, np.uint8)).save(picture)
    Image.fromarray(np.pad(np.full((32, 32), 255, np.uint8), 16)).save(mask)
    starts = {"plain": Init(str(picture)), "masked": Init(str(picture), mask=str(mask))}
    fields = {**fields, **({"init": starts[fields["init"]]} if "init" in fields else {})}
    jobs = [
        Job(f"a {i}", width=64, height=64, steps=4, seed_mode="batch", batch_index=i, **fields)
        for i in range(2)
    ]
    pipeline = Pipeline(tiny)
    made, skipped = Counting(), Counting()
    pipeline.make(jobs, made)
    pipeline.skip(jobs, skipped)
    assert skipped.shapes == made.shapes


# --- kills ---------------------------------------------------------------------------------------------------


@pytest.fixture
def nursery(tmp_path):
    """Starts the script in a process of its own: its process id, and a call that waits for its wait status."""
    with Nursery(tmp_path / "messages") as starter:

        def start(folder, *options):
            run = [*TINY, "--outdir", str(folder), "--n_iter", "6", "--n_samples", "3", "--gallery", *options]
            pid = starter.start(run)
            return pid, lambda: starter.wait(pid)

        yield start


def kills(start, tmp_path, wanted, seed):
    """Kills runs, each gone on with, until `wanted` were killed: how many came to their end in between."""
    began = time.monotonic()
    assert start(tmp_path / "whole")[1]() == 0
    longest = time.monotonic() - began
    expected = images(tree(tmp_path / "whole"))
    chance, killed, ended = random.Random(seed), 0, 0
    while killed < wanted:
        folder = tmp_path / f"out{ended}"
        pid, status = start(folder, "--resume")
        time.sleep(chance.uniform(0, longest))
        os.kill(pid, signal.SIGKILL)
        ended_by = status()
        killed += ended_by == signal.SIGKILL
        here = tree(folder) if folder.exists() else {}
        samples = {name: data for name, data in here.items() if name.startswith("samples/0")}
        assert all(expected[name] == data for name, data in samples.items())
        if ended_by == 0:
            assert images(here) == expected
            ended += 1
    folder = tmp_path / f"out{ended}"
    assert start(folder, "--resume")[1]() == 0
    assert images(tree(folder)) == expected
    return ended


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_killed_runs_end_as_unbroken_ones(nursery, tmp_path):
    kills(nursery, tmp_path, 6, seed=1)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_many_killed_runs_end_as_unbroken_ones(nursery, tmp_path):
    print(f"60 runs killed, {kills(nursery, tmp_path, 60, seed=2)} ended in between")


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGINT")
def test_an_interrupted_run_says_how_to_go_on(nursery, tmp_path):
    folder = tmp_path / "out"
    pid, status = nursery(folder, "--n_iter", "200")
    while not list(folder.glob("samples/*.png")):
        time.sleep(0.02)
    os.kill(pid, signal.SIGINT)
    assert os.waitstatus_to_exitcode(status()) == 130
    assert "--resume" in (tmp_path / "messages").read_text()
    assert len(list(folder.glob("samples/*.png"))) % 3 == 0
    assert (folder / "grid-0000.png").exists()
