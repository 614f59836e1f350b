"""Runs that are interrupted and resumed: in the end every byte is that of an uninterrupted run."""

import errno
import hashlib
import json
import os
import random
import re
import shutil
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
from ldm.checkpoints.adapters.lora_files import settings_file
from ldm.checkpoints.configs import BUNDLED_CKPT, BUNDLED_CONFIG
from ldm.images.grid import _Page
from ldm.images.writer import encode_png
from ldm.job import Init, Job
from ldm.pipeline import Pipeline
from ldm.runs.settings import file_digests, foreign_classes, vocabulary_files
from tests.support.fake_run import in_batches, make_jobs, run_without_model
from tests.support.forking import ForkServer
from tests.support.golden_data import small_config, tiny_model
from tests.support.paths import ROOT, tree

TINY = ["--device", "cpu", "--ddim_steps", "2", "--quiet", "--W", "64", "--H", "64"]
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def images(files):
    """All files except the run file, which lists the unfinished grids of an interrupted run."""
    return {name: data for name, data in files.items() if not name.endswith(".json")}


def rewrite(path, **made_from):
    content = json.loads(path.read_text())
    content["made_from"].update(made_from)
    path.write_text(json.dumps(content))


# --- without a model -----------------------------------------------------------------------------------------


def test_a_broken_run_ends_as_an_unbroken_one(tmp_path):
    jobs, batches = make_jobs(11), in_batches(11, 2)
    run_without_model(tmp_path / "whole", jobs, batches)
    for stop in range(1, 6):
        folder = tmp_path / str(stop)
        assert run_without_model(folder, jobs, batches, stop_after=stop)[0] == stop
        assert (folder / "grid-0000.png").exists()
        assert run_without_model(folder, jobs, batches, resume=True)[0] == 6 - stop
        assert images(tree(folder)) == images(tree(tmp_path / "whole"))


def test_a_batch_that_lacks_one_image_is_made_again_and_only_that_is_written(tmp_path):
    jobs, batches = make_jobs(6), in_batches(6, 3)
    run_without_model(tmp_path, jobs, batches)
    before = tree(tmp_path)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("samples/*.png")}
    (tmp_path / "samples/00004.png").unlink()
    made, _, existing = run_without_model(tmp_path, jobs, batches, resume=True)
    assert (made, existing) == (1, 5)
    assert tree(tmp_path) == before
    assert all(path.stat().st_mtime_ns == at for path, at in kept.items() if path.stem != "00004")


def test_what_is_made_again_is_compared(tmp_path, caplog):
    jobs = make_jobs(3)
    run_without_model(tmp_path, jobs, [[0, 1, 2]])
    (tmp_path / "samples/00000.png").unlink()
    Image.new("RGB", (16, 16)).save(tmp_path / "samples/00001.png")
    foreign = (tmp_path / "samples/00001.png").read_bytes()
    run_without_model(tmp_path, jobs, [[0, 1, 2]], resume=True, skip_grid=True)
    assert (tmp_path / "samples/00001.png").read_bytes() == foreign
    assert "00001.png differs from what was made" in caplog.text
    assert "00002.png" not in caplog.text


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_verify_makes_damaged_files_again(tmp_path, damage, caplog):
    jobs = make_jobs(4)
    run_without_model(tmp_path, jobs, in_batches(4, 2))
    before, path = tree(tmp_path), tmp_path / "samples/00002.png"
    data = bytearray(path.read_bytes())
    data[-60] ^= 255
    path.write_bytes({"cut": path.read_bytes()[:-200], "flipped": bytes(data), "empty": b""}[damage])
    assert run_without_model(tmp_path, jobs, in_batches(4, 2), resume=True, verify=True)[0] == 1
    assert tree(tmp_path) == before
    assert "00002.png is damaged" in caplog.text


def test_a_grid_that_is_not_the_runs_own_stays(tmp_path, caplog):
    jobs = make_jobs(4)
    run_without_model(tmp_path, jobs, in_batches(4, 2), stop_after=1)
    (tmp_path / "grid-0000.png").write_bytes(b"mine")
    run_without_model(tmp_path, jobs, in_batches(4, 2), resume=True)
    assert (tmp_path / "grid-0000.png").read_bytes() == b"mine"
    assert "is left alone" in caplog.text


def test_the_newest_run_that_matches_is_gone_on_with(tmp_path):
    one, other = make_jobs(4), make_jobs(4, scale=3.0)
    run_without_model(tmp_path, one, in_batches(4, 2))
    run_without_model(tmp_path, other, in_batches(4, 2), stop_after=1)
    (tmp_path / "samples/00003.png").unlink()
    run_without_model(tmp_path, one, in_batches(4, 2), resume=True)
    assert (tmp_path / "samples/00003.png").exists()
    run_without_model(tmp_path, other, in_batches(4, 2), resume=True)
    assert len(list(tmp_path.glob("samples/*.png"))) == 8


def test_a_run_whose_numbers_went_to_a_later_one_is_refused(tmp_path):
    run_without_model(tmp_path, make_jobs(6), in_batches(6, 2), stop_after=1)
    run_without_model(tmp_path, make_jobs(2, scale=3.0), [[0, 1]])
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=r"a later run .* has the numbers from 2 on"):
        run_without_model(tmp_path, make_jobs(6), in_batches(6, 2), resume=True)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"steps": 9}, r"steps \(9 there, 50 now\)"),
        ({"precision": "bf16"}, r"precision \(bf16 there, full now\)"),
    ],
)
def test_a_changed_setting_is_refused_with_both_values(tmp_path, change, said):
    run_without_model(tmp_path, make_jobs(2), [[0, 1]])
    rewrite(tmp_path / "run-00000.json", **change)
    with pytest.raises(ValueError, match=said):
        run_without_model(tmp_path, make_jobs(2), [[0, 1]], resume=True)


def test_other_weights_are_refused(tmp_path):
    run_without_model(tmp_path, make_jobs(2), [[0, 1]])
    path = tmp_path / "run-00000.json"
    path.write_text(path.read_text().replace("ab" * 32, "cd" * 32))
    with pytest.raises(ValueError, match=r"sha256.checkpoint \((cd){28}.* there, (ab){28}.* now\)"):
        run_without_model(tmp_path, make_jobs(2), [[0, 1]], resume=True)


def test_a_run_file_of_the_version_before_resumes(tmp_path):
    run_without_model(tmp_path, make_jobs(2), in_batches(2, 1))
    path = tmp_path / "run-00000.json"
    content = json.loads(path.read_text())
    del content["tiles"], content["made_from"]["upscale_in"]
    assert content["made_from"]["seed"].startswith("0 and others, digest ")
    content["made_from"]["seed"] = content["made_from"]["seed"].replace("0 and others", "several")
    path.write_text(json.dumps({**content, "version": 2, "unfinished": []}))
    (tmp_path / "samples/00001.png").unlink()
    assert run_without_model(tmp_path, make_jobs(2), in_batches(2, 1), resume=True)[0] == 1


def test_a_run_file_from_before_a_field_was_added_resumes(tmp_path):
    run_without_model(tmp_path, make_jobs(2), in_batches(2, 1))
    path = tmp_path / "run-00000.json"
    content = json.loads(path.read_text())
    assert content["made_from"]["eta"] == 0.0  # as runs had it before a sampler had a share of its own
    for name in ("schedule", "sigmas", "s_churn", "clip_skip", "guidance_interval"):
        del content["made_from"][name]
    path.write_text(json.dumps(content))
    (tmp_path / "samples/00001.png").unlink()
    assert run_without_model(tmp_path, make_jobs(2), in_batches(2, 1), resume=True)[0] == 1


# --- run files that a stranger wrote -------------------------------------------------------------------------

ESC = "\x1b[2J"


@pytest.mark.parametrize(
    "forged", [{"made_from": {ESC: 1}}, {"sha256": {ESC: "ab"}}, {"made_from": {ESC: ESC}}]
)
def test_names_in_a_run_file_reach_the_terminal_escaped(tmp_path, forged):
    run_without_model(tmp_path, make_jobs(1), [[0]])
    path = tmp_path / "run-00000.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **forged}))
    with pytest.raises(ValueError, match=r"\\x1b\[2J") as caught:
        run_without_model(tmp_path, make_jobs(1), [[0]], resume=True)
    assert "\x1b" not in str(caught.value)


def test_a_version_that_nobody_knows_is_not_printed(tmp_path, caplog):
    run_without_model(tmp_path, make_jobs(1), [[0]])
    path = tmp_path / "run-00000.json"
    content = json.loads(path.read_text())
    content["versions"] |= {ESC: "1", "torch": ESC}
    path.write_text(json.dumps(content))
    run_without_model(tmp_path, make_jobs(1), [[0]], resume=True)
    assert r"torch (\x1b[2J there" in caplog.text
    assert "\x1b" not in caplog.text


@pytest.mark.parametrize(
    "forged",
    [
        {"first": -5}, {"first": True}, {"jobs": -1}, {"jobs": 10**30}, {"pages": {"grid": [-5, 1]}},
        {"pages": {"grid": 3}}, {"pages": {"grid": [0]}}, {"pages": {"../x": [0, 1]}}, {"sha256": {"a": 5}},
        {"versions": {"torch": 5}}, {"versions": None}, {"made_from": []}, {"tiles": {"64x64": 0}},
        {"tiles": {"x": 64}}, {"tiles": {"64x64": [64]}}, {"made_from": {"a": [[[[[[[[[]]]]]]]]]}},
    ],
    ids=str,
)  # fmt: skip
def test_odd_values_in_a_run_file_make_it_no_run_file(tmp_path, caplog, forged):
    run_without_model(tmp_path, make_jobs(1), [[0]])
    before = images(tree(tmp_path))
    path = tmp_path / "run-00000.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **forged}))
    with pytest.raises(ValueError, match="no run file, so there is no run to resume"):
        run_without_model(tmp_path, make_jobs(1), [[0]], resume=True)
    assert "run-00000.json is not a run file of this version" in caplog.text
    assert images(tree(tmp_path)) == before


def test_numbers_that_are_not_the_commands_are_refused(tmp_path):
    run_without_model(tmp_path, make_jobs(2), [[0, 1]])
    path = tmp_path / "run-00000.json"
    for forged in ({"jobs": 3}, {"pages": {}}, {"pages": {"grid": [0, 2]}}):
        path.write_text(json.dumps({**json.loads(path.read_text()), **forged}))
        with pytest.raises(ValueError, match="claims other numbers"):
            run_without_model(tmp_path, make_jobs(2), [[0, 1]], resume=True)


@pytest.mark.parametrize("marked", [False, True])
def test_no_run_file_has_another_grid_overwritten(tmp_path, caplog, marked):
    run_without_model(
        tmp_path, make_jobs(3, scale=3.0), [[0, 1, 2]], stop_after=0 if marked else None
    )  # grid-0000.png
    run_without_model(tmp_path, make_jobs(2), [[0, 1]])
    (tmp_path / "samples/00000.png").write_bytes(b"so that the second run keeps its number")
    grid = tmp_path / "grid-0000.png"
    grid.write_bytes(encode_png(np.zeros((8, 8, 3), np.uint8), unfinished="run-00009.json" if marked else ""))
    before = grid.read_bytes()
    (path,) = [p for p in tmp_path.glob("run-*.json") if json.loads(p.read_text())["jobs"] == 2]
    content = json.loads(path.read_text())
    content["pages"]["grid"] = [0, 1]
    content["unfinished"] = [hashlib.sha256(before).hexdigest()]
    path.write_text(json.dumps(content))
    run_without_model(tmp_path, make_jobs(2), [[0, 1]], resume=True)
    assert grid.read_bytes() == before
    assert "grid-0000.png was not written by this run" in caplog.text


@pytest.mark.skipif(sys.platform == "win32", reason="needs pipes with a name")
@pytest.mark.parametrize("name", ["run-00000.json", "samples/00001.png", "grid-0000.png", "gallery.html"])
def test_a_pipe_in_a_run_folder_hangs_nothing(tmp_path, caplog, name):
    run_without_model(tmp_path, make_jobs(2), in_batches(2, 1))
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    (tmp_path / "samples/00000.png").unlink()
    if name.startswith("run"):
        with pytest.raises(ValueError, match="no run file"):
            run_without_model(tmp_path, make_jobs(2), in_batches(2, 1), resume=True)
    else:
        run_without_model(tmp_path, make_jobs(2), in_batches(2, 1), resume=True, gallery=True)
        assert "pipe" in caplog.text or "is left alone" in caplog.text
    assert (tmp_path / name).is_fifo()


# --- a disk that fails ---------------------------------------------------------------------------------------


def fail_nth(monkeypatch, owner, call, n):
    """Makes the n-th call of a function fail as on a full disk; the list is not empty if that happened."""
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
    run_without_model(tmp_path / "whole", jobs, batches)
    whole = images(tree(tmp_path / "whole"))
    for n in count(1):
        folder = tmp_path / f"{call}{n}"
        with monkeypatch.context() as patch:
            seen = fail_nth(patch, owner, call, n)
            try:
                run_without_model(folder, jobs, batches)
            except (OSError, ValueError) as error:
                assert "No space left" in str(error)
        here = images(tree(folder)) if folder.exists() else {}
        assert all(whole[name] == data for name, data in here.items() if name.startswith("samples"))
        assert not list(folder.rglob("*.part"))
        run_without_model(folder, jobs, batches, resume=True)
        assert images(tree(folder)) == whole
        if len(seen) < n:
            break
    print(f"{call} failed at each of {n - 1} times")
    assert n > 1


@pytest.mark.parametrize("owner", ["ldm.images.writer", "ldm.images.grid", "ldm.runs.run_file"])
def test_a_full_disk_is_said_with_counts_and_advice(tmp_path, monkeypatch, capsys, owner):
    calls = count()

    def full(*args, **named):
        if owner == "ldm.images.writer" and next(calls) < 4:  # two tries, the run file is not written by it
            return write(*args, **named)
        raise OSError(FULL.errno, FULL.strerror)

    from ldm.images import writer

    write = writer._write_new
    place = {
        "ldm.images.writer": "ldm.images.writer._write_new",
        "ldm.images.grid": "tempfile.TemporaryFile",
        "ldm.runs.run_file": "ldm.runs.run_file.written_whole",
    }[owner]
    monkeypatch.setattr(place, full)
    assert script(tmp_path, "--n_samples", "1", "--n_iter", "3", "--json") == 1
    *_, error, done = map(json.loads, capsys.readouterr().out.splitlines())
    assert re.search(rf"disk full in {tmp_path}: [012] of 3 images saved; .* with --resume", error["text"])
    assert (done["event"], done["code"]) == ("done", 1)
    assert done["saved"] == len(list(tmp_path.glob("samples/*.png")))


# --- the script ----------------------------------------------------------------------------------------------


def script(folder, *options):
    return txt2img.main([*TINY, "--outdir", str(folder), *options])


@pytest.mark.parametrize(
    "options",
    [
        ["--ddim_eta", "0.5"],
        ["--seed_mode", "batch"],
        pytest.param(["--seed_mode", "batch", "--plms", "--fixed_code"], marks=pytest.mark.long),
        pytest.param(
            ["--seed_mode", "batch", "--rng", "cpu", "--ddim_eta", "1", "--upscale", "2"],
            marks=pytest.mark.long,
        ),
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


@pytest.mark.parametrize(
    "size", ["64", pytest.param("256", marks=pytest.mark.slow)]
)  # the watermark begins at 256
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


ONE = ["--n_iter", "1", "--n_samples", "1"]


def test_a_renamed_textual_inversion_is_refused(tmp_path, capsys):
    file = tmp_path / "e.pt"
    torch.save({"emb_params": torch.zeros(1, 192)}, file)
    assert script(tmp_path / "out", *ONE, "--embedding", f"{file}=foo") == 0
    assert script(tmp_path / "out", *ONE, "--resume", "--embedding", f"{file}=bar") == 2
    assert "e.pt (foo there, bar now)" in capsys.readouterr().err


def reorder(merges):
    first, second, *rest = merges.read_text().splitlines(keepends=True)
    merges.write_text("".join([rest[0], first, second, *rest[1:]]))


def test_another_token_table_of_a_config_is_refused(tmp_path, capsys):
    tables = shutil.copytree(ROOT / "models/ldm/shapes", tmp_path / "tables")
    text = (ROOT / BUNDLED_CONFIG).read_text().replace("models/ldm/shapes", str(tables))
    (tmp_path / "own.yaml").write_text(text)
    run = [*ONE, "--config", str(tmp_path / "own.yaml"), "--ckpt", str(ROOT / BUNDLED_CKPT)]
    assert script(tmp_path / "out", *run) == 0
    reorder(tables / "merges.txt")
    assert script(tmp_path / "out", *run, "--resume") == 2
    assert re.search(r"merges.txt \(\w+\S* there, \w+\S* now\)", capsys.readouterr().err)


def test_another_tokenizer_of_a_folder_of_weights_is_another_run(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(ROOT / "models/ldm/shapes" / name, tmp_path / "tokenizer")
    before = file_digests(vocabulary_files(tmp_path, None))
    assert file_digests(vocabulary_files(Path("x.ckpt"), str(tmp_path))) == before
    reorder(tmp_path / "tokenizer/merges.txt")
    after = file_digests(vocabulary_files(tmp_path, None))
    assert [Path(path).name for path in before if before[path] != after[path]] == ["merges.txt"]


@pytest.mark.parametrize("file", ["my_encoder.py", "my_encoder/__init__.py", "my_encoder/below.py"])
def test_another_class_of_a_foreign_package_is_another_run(tmp_path, monkeypatch, file):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_encoder", raising=False)
    (tmp_path / file).parent.mkdir(exist_ok=True)
    if "/" in file:
        (tmp_path / "my_encoder/__init__.py").touch()
    (tmp_path / file).write_text("class Mine:\n    pass\n")
    params = {"unet_config": {"target": "my_encoder.Mine"}}
    config = {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params}
    before = foreign_classes(config)
    (tmp_path / file).write_text("class Mine:\n    word = 1\n")
    after = foreign_classes(config)
    assert (list(before), list(after), before != after) == (["my_encoder"], ["my_encoder"], True)


def test_the_settings_of_a_lora_of_peft_are_part_of_it(tmp_path):
    weights, settings = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    assert settings_file(weights) is None
    settings.write_text("{}")
    assert settings_file(weights) == settings
    assert settings_file(tmp_path / "ink.safetensors") is None


def test_a_safety_model_that_came_meanwhile_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert script(tmp_path / "out", *ONE) == 0
    folder = tmp_path / "models/safety_checker"
    folder.mkdir(parents=True)
    torch.save({"state_dict": {"x": torch.zeros(1)}}, folder / "pytorch_model.bin")
    assert script(tmp_path / "out", *ONE, "--resume") == 2
    assert re.search(r"pytorch_model.bin \(nothing there, \w+\S* now\)", capsys.readouterr().err)


def test_the_tiles_of_the_beginning_are_used_again(tmp_path, monkeypatch):
    run = ["--n_iter", "2", "--n_samples", "1", "--W", "320", "--ddim_steps", "1"]
    monkeypatch.setattr("ldm.pipeline.first_stage.available_memory", lambda device: 1)
    assert script(tmp_path, *run) == 0
    before = tree(tmp_path)
    assert json.loads(before["run-00000.json"])["tiles"] == {"320x64": 32}
    (tmp_path / "samples/00001.png").unlink()
    monkeypatch.setattr("ldm.pipeline.first_stage.available_memory", lambda device: 2**50)
    assert script(tmp_path, *run, "--resume") == 0
    assert tree(tmp_path) == before


def test_a_finished_run_is_not_made_again(tmp_path, monkeypatch, capsys):
    assert script(tmp_path, *ONE) == 0
    before = tree(tmp_path)
    (tmp_path / "grid-0000.png").unlink()
    monkeypatch.setattr("ldm.pipeline.load_model", None)
    loud = [word for word in TINY if word != "--quiet"]
    assert txt2img.main([*loud, *ONE, "--outdir", str(tmp_path), "--resume"]) == 0
    assert "nothing to do: all 1 images exist" in capsys.readouterr().err
    assert tree(tmp_path) == before
    monkeypatch.setattr("ldm.runs.existing.read_pixels", None)  # with its grid there, no image is looked at
    assert script(tmp_path, *ONE, "--resume") == 0


def test_a_damaged_file_below_a_sweep_is_a_failure(tmp_path, monkeypatch, capsys):
    run = [*ONE, "--sweep", "scale=1,4", "--ddim_steps", "1"]
    assert script(tmp_path, *run) == 0
    (tmp_path / "samples/00000.png").write_bytes(b"torn")
    for name in ("grid-0000.png", "sheet-0000.png", "samples/00001.png"):
        (tmp_path / name).unlink()
    assert script(tmp_path, *run, "--resume") == 1
    assert "samples/00000.png cannot be read" in capsys.readouterr().err
    assert (tmp_path / "samples/00001.png").exists()
    assert script(tmp_path, *run, "--resume", "--verify") == 0
    assert (tmp_path / "sheet-0000.png").exists()


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
    """A stream that only records its draws."""

    def __init__(self):
        self.shapes = []

    def draw(self, shape):
        self.shapes.append(tuple(shape))
        return torch.zeros(tuple(shape))

    def skip(self, shape):
        self.shapes.append(tuple(shape))


@pytest.fixture(scope="module")
def small():
    return tiny_model(small_config())


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
def test_skipping_a_batch_draws_what_making_it_draws(small, tmp_path, fields):
    picture, mask = tmp_path / "picture.png", tmp_path / "mask.png"
    Image.fromarray(np.full((64, 64, 3), 100, np.uint8)).save(picture)
    Image.fromarray(np.pad(np.full((32, 32), 255, np.uint8), 16)).save(mask)
    starts = {"plain": Init(str(picture)), "masked": Init(str(picture), mask=str(mask))}
    fields = {**fields, **({"init": starts[fields["init"]]} if "init" in fields else {})}
    jobs = [
        Job(f"a {i}", width=64, height=64, steps=4, seed_mode="batch", batch_index=i, **fields)
        for i in range(2)
    ]
    pipeline = Pipeline(small)
    made, skipped = Counting(), Counting()
    pipeline.make(jobs, made)
    pipeline.skip(jobs, skipped)
    assert skipped.shapes == made.shapes


# --- kills ---------------------------------------------------------------------------------------------------


@pytest.fixture
def fork_server(tmp_path):
    """Starts the script in a separate process; returns its id, and a function that waits for its wait status."""
    with ForkServer(tmp_path / "messages") as starter:

        def start(folder, *options):
            run = [*TINY, "--outdir", str(folder), "--n_iter", "6", "--n_samples", "3", "--gallery", *options]
            pid = starter.start(run)
            return pid, lambda: starter.wait(pid)

        yield start


def kills(start, tmp_path, wanted, seed):
    """Kills runs, each resumed, until `wanted` were killed; returns how many ended in between."""
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


@pytest.mark.kill
@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_killed_runs_end_as_unbroken_ones(fork_server, tmp_path):
    kills(fork_server, tmp_path, 6, seed=1)


@pytest.mark.slow
@pytest.mark.kill
@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_many_killed_runs_end_as_unbroken_ones(fork_server, tmp_path):
    print(f"60 runs killed, {kills(fork_server, tmp_path, 60, seed=2)} ended in between")


@pytest.mark.kill
@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGINT")
def test_an_interrupted_run_says_how_to_go_on(fork_server, tmp_path):
    folder = tmp_path / "out"
    pid, status = fork_server(folder, "--n_iter", "200")
    while not list(folder.glob("samples/*.png")):
        time.sleep(0.02)
    os.kill(pid, signal.SIGINT)
    assert os.waitstatus_to_exitcode(status()) == 130
    assert "--resume" in (tmp_path / "messages").read_text()
    assert len(list(folder.glob("samples/*.png"))) % 3 == 0
    assert (folder / "grid-0000.png").exists()
