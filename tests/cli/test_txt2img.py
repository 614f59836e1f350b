"""The command line: options, images, messages and exit codes."""

import importlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import scripts.replay as replay
import scripts.txt2img as txt2img
from ldm.checkpoints import configs as known
from ldm.cli.values import request_of
from ldm.metadata.infotext import job_from_infotext, parse_infotext
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.pipeline import Pipeline
from ldm.runs.output import Output
from ldm.runs.starts import own_size
from tests.support.paths import ROOT
from tests.support.scripts import FAST, interruptible


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """Runs the script with the bundled model in this process; returns exit code and images by name."""
    monkeypatch.chdir(tmp_path)

    def run(*options, outdir="out"):
        code = txt2img.main([*FAST, "--outdir", outdir, *options])
        folder = tmp_path / outdir
        return code, {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*.png"))}

    return run


def same(a, b):
    return np.array_equal(np.asarray(Image.open(a)), np.asarray(Image.open(b)))


# --- the original's options ---------------------------------------------------------------------------------

ORIGINAL_DEFAULTS = {
    "prompt": "a painting of a virus monster playing guitar",
    "outdir": "outputs/txt2img-samples",
    "skip_grid": False,
    "skip_save": False,
    "ddim_steps": 50,
    "plms": False,
    "dpm_solver": False,
    "laion400m": False,
    "fixed_code": False,
    "ddim_eta": None,  # the sampler's own, which is 0 for those of the original
    "n_iter": 2,
    "C": 4,
    "f": 8,
    "n_samples": 3,
    "n_rows": 0,
    "scale": 7.5,
    "from_file": None,
    "seed": 42,
    "precision": "autocast",
}


def test_every_option_of_the_original_has_its_default():
    options = vars(txt2img.parser().parse_args([]))
    assert {name: options[name] for name in ORIGINAL_DEFAULTS} == ORIGINAL_DEFAULTS
    # the rest depends on which model is there
    unset = ("H", "W", "config", "ckpt")
    assert {name: options[name] for name in unset} == dict.fromkeys(unset)
    assert known.V1_CONFIG == "configs/stable-diffusion/v1-inference.yaml"
    assert known.V1_CKPT == "models/ldm/stable-diffusion-v1/model.ckpt"


def test_v1_draws_512_by_512():
    options = txt2img.parser().parse_args([])
    from ldm.config import read_config

    assert own_size(request_of(options), read_config(known.V1_CONFIG)) == (512, 512)


# --- images -----------------------------------------------------------------------------------------------


def test_files_and_grid(draw):
    code, files = draw("--n_iter", "2", "--n_samples", "3", "--n_rows", "2")
    assert code == 0
    assert list(files) == ["grid-0000.png", *(f"samples/{i:05}.png" for i in range(6))]
    assert Image.open(files["samples/00000.png"]).size == (64, 64)
    assert Image.open(files["grid-0000.png"]).size == (2 * 66 + 2, 3 * 66 + 2)


def test_later_runs_add_and_never_overwrite(draw):
    _, files = draw("--n_samples", "2")
    before = {name: path.read_bytes() for name, path in files.items()}
    files["samples/00000.png"].unlink()
    _, files = draw()
    assert list(files) == ["grid-0000.png", "grid-0001.png", "samples/00001.png", "samples/00002.png"]
    assert files["samples/00001.png"].read_bytes() == before["samples/00001.png"]


def test_skipping(draw):
    assert list(draw("--skip_grid", outdir="a")[1]) == ["samples/00000.png"]
    assert list(draw("--skip_save", outdir="b")[1]) == ["grid-0000.png"]


def test_the_command_is_in_the_picture(draw):
    prompt = 'a "red" cube, on top of:\na blue sphere 東京 <script>'
    _, files = draw("--prompt", prompt, "--seed", "7", "--plms", "--scale", "5", "--negative_prompt", "dull")
    text = Image.open(files["samples/00000.png"]).text["parameters"]
    job = job_from_infotext(text)
    assert (job.prompt, job.negative_prompt) == (prompt, "dull")
    assert (job.seed, job.sampler, job.scale, job.steps) == (7, "plms", 5.0, 2)
    assert (job.width, job.height) == (64, 64)
    assert re.fullmatch(r"[0-9a-f]{10}", parse_infotext(text)["Model hash"])


def test_image_i_can_be_made_alone(draw):
    _, many = draw("--n_samples", "3", "--precision", "full", "--no_watermark", "--seed", "5")
    _, alone = draw("--seed", "7", "--precision", "full", "--no_watermark", outdir="alone")
    third = np.asarray(Image.open(many["samples/00002.png"]), dtype=int)
    again = np.asarray(Image.open(alone["samples/00000.png"]), dtype=int)
    assert np.abs(third - again).max() <= 2


@pytest.mark.long
def test_how_weights_are_held_changes_no_pixel(draw, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    small = ("--precision", "bf16", "--W", "16", "--H", "16")  # slow where the CPU has no bf16 instructions
    _, usual = draw(*small)
    for option, times in (("--lowmem", 1), ("--no_mmap", 1), ("--cache_weights", 2)):
        for i in range(times):  # the second finds what the first has cached
            code, files = draw(*small, option, outdir=f"{option[2:]}{i}")
            assert code == 0
            assert same(usual["samples/00000.png"], files["samples/00000.png"]), option
        assert bool(list(tmp_path.glob("cache/ldm-v1/weights/*"))) == (option == "--cache_weights")


def test_fixed_code_repeats_the_noise(draw):
    _, files = draw("--n_iter", "2", "--fixed_code")
    assert same(files["samples/00000.png"], files["samples/00001.png"])
    _, files = draw("--n_iter", "2", outdir="free")
    assert not same(files["samples/00000.png"], files["samples/00001.png"])


def test_batch_seed_mode_draws_one_stream(draw):
    """Image 0 agrees with image mode, later ones do not: their noise depends on all draws before."""
    options = ("--n_iter", "2", "--precision", "full", "--no_watermark")
    _, batch = draw("--seed_mode", "batch", *options)
    _, image = draw(*options, outdir="image")
    assert same(batch["samples/00000.png"], image["samples/00000.png"])
    assert not same(batch["samples/00001.png"], image["samples/00001.png"])


def test_one_start_code_serves_short_batches_too(draw, tmp_path):
    (tmp_path / "list.txt").write_text("a\nb\nc\nd")
    options = (
        "--from-file",
        "list.txt",
        "--n_samples",
        "3",
        "--n_iter",
        "2",
        "--fixed_code",
        "--seed_mode",
        "batch",
    )
    code, files = draw(*options, "--precision", "full")
    assert code == 0
    assert len(files) == 9
    # no fresh noise enters a step, so the second time over is the first
    assert all(same(files[f"samples/{i:05}.png"], files[f"samples/{i + 4:05}.png"]) for i in range(4))
    info = parse_infotext(Image.open(files["samples/00000.png"]).text["parameters"])
    assert (info["Batch size"], info["Fixed code"]) == ("3", "on")


@pytest.mark.parametrize("size", [("72", "104"), ("40", "136")])
def test_multiples_of_eight_work(draw, size):
    code, files = draw("--W", size[0], "--H", size[1])
    assert code == 0
    assert Image.open(files["samples/00000.png"]).size == (int(size[0]), int(size[1]))


def test_prompt_file_with_a_short_last_batch(draw, tmp_path):
    prompts = ["a red cube", "a blue sphere", "a green cone", "a white torus"]
    (tmp_path / "list.txt").write_bytes("\ufeff{}\r\n\r\n{}\n{}\n   \n{}".format(*prompts).encode())
    code, files = draw("--from-file", "list.txt", "--n_samples", "3")
    assert code == 0
    texts = [Image.open(files[f"samples/{i:05}.png"]).text["parameters"] for i in range(4)]
    assert [job_from_infotext(text).prompt for text in texts] == prompts
    assert [job_from_infotext(text).seed for text in texts] == [42, 43, 44, 45]


# --- mistakes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--H", "513"], "512 or 520"),
        (["--W", "3"], "--W is 3"),
        (["--W", "0"], "--W is 0"),
        (["--H", "-8"], "--H is -8"),
        (["--H", "8000000", "--W", "8000000"], "GiB"),
        (["--ddim_steps", "0"], "1 to 999"),
        (["--ddim_steps", "1000"], "1 to 999"),
        (["--ddim_steps", "3", "--timestep_spacing", "compvis"], "use [0-9]+ steps"),
        (["--scale", "nan"], "--scale is nan"),
        (["--scale", "1e400"], "--scale is inf"),
        (["--ddim_eta", "-1"], "--ddim_eta is -1"),
        (["--plms", "--ddim_eta", "0.5"], "plms does not use --ddim_eta"),
        (["--dpm_solver", "--ddim_eta", "0.5"], "dpm_solver does not use --ddim_eta"),
        (["--dpm_solver", "--timestep_spacing", "compvis"], "not with dpm_solver"),
        (["--seed", "-2"], "--seed is -2"),
        (
            ["--seed", "18446744073709551616"],
            "--seed is 18446744073709551616; give .* to 18446744073709551615",
        ),
        (
            ["--seed", "4294967296", "--rng", "numpy"],
            "seed is 4294967296, but .* 32 bits; use --rng philox, or a seed",
        ),
        (["--n_samples", "0"], "--n_samples is 0"),
        (["--n_iter", "-2"], "--n_iter is -2"),
        (["--C", "3"], "has 4 latent channels"),
        (["--f", "16"], "factor is 8"),
        (["--ckpt", "no/such.ckpt"], "no/such.ckpt does not exist"),
        (["--config", "no/such.yaml"], "no/such.yaml does not exist"),
        (["--laion400m"], "text2img-large|1p4B"),
        (["--from-file", "no/such.txt"], "no/such.txt"),
        (["--device", "cuda:77"], "cuda:77"),
        (["--device", "toaster"], "toaster"),
        (["--prompt", "caf\udce9"], "UTF-8"),
        (["--outdir", "a_file"], "it is a file"),
        (["--ckpt", "page.ckpt"], "web page"),
        (["--ckpt", "empty.ckpt"], "empty"),
        (["--ckpt", "pointer.ckpt"], "git-lfs"),
        (["--ckpt", "cut.ckpt"], "incomplete"),
        (["--config", "empty.ckpt", "--ckpt", str(ROOT / known.BUNDLED_CKPT)], "not a mapping"),
        (
            ["--config", str(ROOT / known.V1_CONFIG), "--ckpt", str(ROOT / known.BUNDLED_CKPT)],
            "another model|lacks",
        ),
    ],
    ids=lambda value: " ".join(value)[-60:] if isinstance(value, list) else "",
)
def test_mistakes_are_one_line_and_code_2(draw, tmp_path, capsys, options, said):
    (tmp_path / "a_file").write_text("x")
    (tmp_path / "empty.ckpt").write_bytes(b"")
    (tmp_path / "page.ckpt").write_bytes(b"<!DOCTYPE html><html>please log in</html>")
    (tmp_path / "pointer.ckpt").write_bytes(
        b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 4265380512\n"
    )
    (tmp_path / "cut.ckpt").write_bytes((ROOT / known.BUNDLED_CKPT).read_bytes()[:100_000])
    if "--ckpt" in options and "--config" not in options:
        options = [*options, "--config", str(ROOT / known.BUNDLED_CONFIG)]
    code = txt2img.main([*FAST, "--outdir", "out", *options])
    error = capsys.readouterr().err
    assert code == 2
    assert re.search(said, error)
    assert "Traceback" not in error
    assert "\x1b" not in error
    assert len(error.strip().splitlines()) == 1
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize("option", ["--gallery", "--resume"])
def test_what_needs_files_is_refused_without_them(draw, capsys, option):
    assert draw("--skip_save", option) == (2, {})
    assert f"--skip_save leaves no files for {option}" in capsys.readouterr().err


def test_a_shard_that_is_missing_is_one_line(tmp_path, capsys):
    index = {"weight_map": {"x": "gone.safetensors"}}
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    options = ["--ckpt", str(tmp_path), "--config", str(ROOT / known.BUNDLED_CONFIG)]
    assert txt2img.main([*FAST, "--outdir", str(tmp_path / "out"), *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "gone.safetensors" in line


def test_two_samplers_are_a_usage_error(capsys):
    with pytest.raises(SystemExit) as caught:
        txt2img.main(["--plms", "--dpm_solver"])
    assert caught.value.code == 2
    assert re.search("--dpm_solver.*--plms", capsys.readouterr().err)


def test_debug_shows_the_traceback(draw, capsys):
    draw("--H", "513", "--debug")
    assert "Traceback" in capsys.readouterr().err


def test_an_unforeseen_fault_is_one_line_and_code_1(draw, capsys, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("somewhere")

    monkeypatch.setattr("ldm.pipeline.Pipeline.begin", broken)
    code, files = draw()
    error = capsys.readouterr().err
    assert (code, files) == (1, {})
    assert "this is a bug" in error
    assert len(error.strip().splitlines()) == 1


def test_a_batch_begins_before_the_last_one_is_finished(draw, monkeypatch):
    """So that a device has prompts and steps to continue with while images are being finished."""
    begin, finish, begun = Pipeline.begin, Pipeline.finish, [threading.Event() for _ in range(3)]
    order = iter(begun)

    def note(*args):
        next(order).set()
        return begin(*args)

    def wait(self, pending):
        number = pending[0].job.seed - 42
        assert begun[min(number + 1, 2)].wait(30)
        return finish(self, pending)

    monkeypatch.setattr(Pipeline, "begin", note)
    monkeypatch.setattr(Pipeline, "finish", wait)
    make = importlib.import_module("ldm.runs.make")
    monkeypatch.setattr(make, "Output", lambda *args: Output(*args[:9], False, *args[10:]))  # as on a GPU
    code, files = draw("--n_iter", "3", "--n_samples", "1", "--ddim_steps", "1")
    assert (code, len([name for name in files if name.startswith("samples")])) == (0, 3)


def test_out_of_memory_is_named(draw, capsys, monkeypatch):
    import torch

    def full(*_):
        raise torch.OutOfMemoryError("tried to allocate 20 GiB")

    monkeypatch.setattr("ldm.pipeline.Pipeline.begin", full)
    assert draw()[0] == 1
    assert "--n_samples" in capsys.readouterr().err


@pytest.fixture
def small_memory(monkeypatch):
    """A machine whose U-Net runs out of memory above a number of images; returns the sizes of its calls."""
    real, sizes = LatentDiffusion.apply_model, []

    def apply(self, x, t, cond):
        sizes.append(len(x) // 2)  # with and without the prompt
        if sizes[-1] > apply.most:
            raise apply.error
        return real(self, x, t, cond)

    apply.most, apply.error = 2, torch.OutOfMemoryError("tried to allocate 20 GiB")
    monkeypatch.setattr(LatentDiffusion, "apply_model", apply)
    return apply, sizes


OOM = ["--n_samples", "5", "--n_iter", "2", "--precision", "full", "--ddim_steps", "1"]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("x"),
        pytest.param(RuntimeError("can't allocate memory: you tried"), marks=pytest.mark.long),
    ],
)
def test_a_batch_is_halved_where_memory_runs_out(draw, small_memory, capsys, tmp_path, error):
    memory, sizes = small_memory
    memory.error = error
    code, files = draw(*OOM, "--on_oom", "halve")
    assert (code, len(files)) == (0, 11)
    assert sizes == [5, 3, 2, 2, 1, 2, 2, 1]
    assert "out of memory with 5 images at a time; continuing with 3" in capsys.readouterr().err
    said = [parse_infotext(Image.open(files[f"samples/{i:05}.png"]).text["parameters"]) for i in range(5)]
    assert [(text["Batch size"], text.get("Batch pos")) for text in said] == [
        ("2", "0"), ("2", "1"), ("2", "0"), ("2", "1"), ("1", None),
    ]  # fmt: skip
    assert [text["Seed"] for text in said] == ["42", "43", "44", "45", "46"]
    memory.most = 100
    again = [str(files["samples/00003.png"]), "--verify", "--quiet", "--device", "cpu", "--outdir", "again"]
    assert replay.main(again) == 0
    run = json.loads((tmp_path / "out/run-00000.json").read_text())
    assert run["parts"] == {"0": [2, 2, 1], "5": [2, 2, 1]}


@pytest.mark.long
def test_a_run_that_was_halved_continues_in_the_same_parts(draw, small_memory):
    memory, sizes = small_memory
    _, files = draw(*OOM, "--on_oom", "halve")
    before = {name: path.read_bytes() for name, path in files.items()}
    files["samples/00003.png"].unlink()
    memory.most = 100
    sizes.clear()
    code, files = draw(*OOM, "--resume")  # the option itself changes no image
    assert (code, sizes) == (0, [2, 2, 1])
    assert {name: path.read_bytes() for name, path in files.items()} == before


@pytest.mark.long
def test_without_the_option_a_batch_stays_whole(draw, small_memory, capsys):
    assert draw(*OOM) == (1, {})
    assert small_memory[1] == [5]
    assert "--n_samples" in capsys.readouterr().err
    assert draw(*OOM, "--on_oom", "halve", "--seed_mode", "batch") == (2, {})
    small_memory[0].most = 0
    assert draw(*OOM, "--on_oom", "halve") == (1, {})


@pytest.mark.parametrize("options", [[], ["--keep_going"]])
def test_the_run_stops_at_an_image_that_is_not_finite_unless_told_otherwise(draw, monkeypatch, options):
    real, calls = LatentDiffusion.decode_first_stage, itertools.count()

    def decode(self, z):
        return real(self, z) * (float("nan") if next(calls) == 1 else 1)

    monkeypatch.setattr(LatentDiffusion, "decode_first_stage", decode)
    run = ("--n_samples", "1", "--n_iter", "12", "--ddim_steps", "1", "--skip_grid")
    code, files = draw(*run, *options)
    assert code == 1
    seeds = [job_from_infotext(Image.open(path).text["parameters"]).seed for path in files.values()]
    assert 43 not in seeds
    assert (len(seeds) == 11) == bool(options)


@pytest.mark.parametrize(
    ("said", "line"),
    [
        (
            "[enforce fail at alloc_cpu.cpp:124] . can't allocate memory",
            "out of memory .*--n_samples",
        ),
        (
            "CUDA error: an illegal memory access was encountered",
            "the GPU failed .* finished images are kept",
        ),
    ],
)
def test_what_fails_midway_keeps_what_is_finished(draw, monkeypatch, capsys, said, line):
    real, calls = Pipeline.begin, itertools.count()

    def begin(*args):
        if next(calls) == 1:
            raise RuntimeError(said)
        return real(*args)

    monkeypatch.setattr(Pipeline, "begin", begin)
    code, files = draw("--n_iter", "3")
    assert (code, list(files)) == (1, ["samples/00000.png"])
    (error,) = capsys.readouterr().err.splitlines()
    assert re.search(line, error)
    assert "bug" not in error


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGHUP")
@pytest.mark.parametrize(("times", "saved"), [(1, 1), (2, 0)])
def test_a_terminal_that_closes_ends_the_run(draw, monkeypatch, times, saved):
    real = Pipeline.begin

    def begin(*args):
        for _ in range(times):
            signal.raise_signal(signal.SIGHUP)
        return real(*args)

    monkeypatch.setattr(Pipeline, "begin", begin)
    try:
        code, _ = draw("--n_iter", "9", "--skip_grid", "--W", "64", "--H", "64")
    except SystemExit as left:  # warned of twice
        code = left.code
    assert code == 128 + signal.SIGHUP
    assert len(list(Path("out/samples").glob("*.png"))) == saved


def test_a_signal_that_ends_the_compiler_ends_the_run_in_order(draw, monkeypatch, capsys):
    def begin(*_):
        signal.raise_signal(signal.SIGTERM)
        raise RuntimeError("CppCompileError: C++ compile error")

    monkeypatch.setattr("ldm.pipeline.placement.prepare", lambda *args: None)
    monkeypatch.setattr(Pipeline, "begin", begin)
    assert draw("--compile")[0] == 128 + signal.SIGTERM
    assert "bug" not in capsys.readouterr().err


def test_a_log_without_a_terminal_is_lines_with_the_paths(tmp_path, capsys):
    options = [word for word in FAST if word != "--quiet"]
    assert txt2img.main([*options, "--outdir", str(tmp_path), "--W", "64", "--H", "64"]) == 0
    said = capsys.readouterr().err
    assert f"{tmp_path}/samples/00000.png, seed 42\n" in said
    assert "image 1 of 1, " in said
    assert "\r" not in said


def test_no_black_pictures_from_nan(draw, capsys, monkeypatch):
    import torch

    monkeypatch.setattr(
        "ldm.models.diffusion.ddpm.LatentDiffusion.decode_first_stage",
        lambda self, z: torch.full((1, 3, 64, 64), float("nan")),
    )
    code, files = draw("--prompt", "a red cube", "--gallery")
    assert (code, files) == (1, {})
    assert "a red cube" in capsys.readouterr().err


def test_terminal_controls_in_a_prompt_are_shown_escaped(draw, capsys):
    long = "\x1b[2J\u202e" + " ".join(["cube"] * 100)
    code, files = draw("--prompt", long)
    assert code == 0
    text = Image.open(files["samples/00000.png"]).text["parameters"]
    assert set(parse_infotext(text)["Prompt cut"].split()) == {"cube"}
    error = capsys.readouterr().err
    assert "\x1b" not in error
    assert "\u202e" not in error
    assert "cut off" in error


# --- as a process -------------------------------------------------------------------------------------------


def script(*options, cwd, **settings):
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts/txt2img.py"), *options],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=600,
        **settings,
    )


@pytest.mark.long
def test_works_from_anywhere_offline_and_with_foreign_files_about(tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('planted')")
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "LC_ALL": "C", "PYTHONUTF8": "0"}
    done = script(*FAST[:-1], "--prompt", "ein größerer Würfel", cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "outputs/txt2img-samples/samples/00000.png").is_file()
    assert "bundled model" in done.stderr


def test_closed_messages_do_not_stop_the_run(draw, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    closed = os.fdopen(writer, "w", buffering=1)
    monkeypatch.setattr(sys, "stderr", closed)
    assert txt2img.main([*FAST[:-1], "--outdir", "out"]) == 0
    assert Path("out/grid-0000.png").is_file()
    with pytest.raises(BrokenPipeError):
        print("x", file=closed)


@pytest.mark.slow
def test_a_closed_pipe_does_not_stop_the_run(tmp_path):
    command = f"{sys.executable} {ROOT}/scripts/txt2img.py {' '.join(FAST[:-1])} 2>&1 | head -c 1"
    subprocess.run(command, shell=True, cwd=tmp_path, timeout=600, check=True)
    deadline = time.monotonic() + 600
    while not list(tmp_path.rglob("grid-0000.png")) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert list(tmp_path.rglob("grid-0000.png"))


@pytest.mark.kill
def test_interrupting_finishes_the_batch(tmp_path):
    run = subprocess.Popen(
        [
            *[sys.executable, str(ROOT / "scripts/txt2img.py"), "--outdir", str(tmp_path), "--device", "cpu"],
            *["--n_iter", "400", "--n_samples", "1", "--ddim_steps", "4"],
        ],
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        preexec_fn=interruptible,
    )
    deadline = time.monotonic() + 600
    while not list(tmp_path.glob("samples/*.png")) and time.monotonic() < deadline:
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    _, error = run.communicate(timeout=600)
    assert run.returncode == 130
    assert "Traceback" not in error
    samples = list(tmp_path.glob("samples/*.png"))
    assert 1 <= len(samples) < 400
    for path in samples:
        Image.open(path).load()
    assert list(tmp_path.glob("grid-0000.png"))
    assert not list(tmp_path.rglob("*.part"))
