"""The scripts before anything is drawn: spelling, missing packages, closed streams, early interrupts."""

import argparse
import ast
import importlib
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import scripts.img2img as img2img
import scripts.inpaint as inpaint
import scripts.txt2img as txt2img
from ldm.checkpoints.configs import BUNDLED_CKPT, BUNDLED_CONFIG, V1_CKPT
from ldm.cli.app import main, outcome
from ldm.cli.options import add_report_options, make_parser
from ldm.cli.values import check_options, chosen_sampler
from ldm.config import ConfigError, read_config
from ldm.data.captions import caption
from ldm.data.scenes import scene_at
from ldm.job import Init
from ldm.metadata.infotext import job_from_infotext
from ldm.metadata.read import read_job
from ldm.pipeline import SOLVERS, Pipeline
from ldm.runs.messages import set_up_messages
from ldm.runs.models import _config_of
from ldm.runs.starts import Canvases
from ldm.util import InputError, printable
from tests.support.golden_data import small_config
from tests.support.paths import ROOT
from tests.support.scripts import FAST

SCRIPTS = sorted(path.stem for path in (ROOT / "scripts").glob("*.py"))
MODEL = str(ROOT / BUNDLED_CKPT)
TYPED = {  # enough to begin with
    "convert": [MODEL, "b.ckpt"],
    "img2img": ["--init-img", "a.png"],
    "inspect_model": [MODEL],
    "replay": ["a.png", "--ckpt", MODEL],
    "train": ["text"],
}


def parser_of(name):
    return importlib.import_module(f"scripts.{name}").parser()


def refusal(capsys, parser, *typed):
    """The error for a command line that the parser refuses."""
    with pytest.raises(SystemExit) as caught:
        parser.parse_args([*typed])
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """Runs txt2img.py with the bundled model on a small image; returns exit code and files by name."""
    monkeypatch.chdir(tmp_path)

    def run(*options):
        code = txt2img.main([*FAST, "--outdir", "out", "--skip_grid", *options])
        return code, sorted(path.name for path in (tmp_path / "out").rglob("*.png"))

    return run


# --- spelling -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCRIPTS)
def test_hyphens_and_underscores_are_alike_in_every_option(name):
    parser = parser_of(name)
    for option in [*parser._option_string_actions]:
        if option.startswith("--"):
            for spelling in (option[2:].replace("_", "-"), option[2:].replace("-", "_")):
                assert parser._own_name(f"--{spelling}=x") == f"{option}=x"


@pytest.mark.parametrize(
    ("typed", "name", "value"),
    [
        ("--steps 5", "ddim_steps", 5),
        ("--ddim-steps 5", "ddim_steps", 5),
        ("--ddim_st 5", "ddim_steps", 5),
        ("-s 5", "ddim_steps", 5),
        ("-s5", "ddim_steps", 5),
        ("--width 64", "W", 64),
        ("--height=64", "H", 64),
        ("-W64", "W", 64),
        ("-H 64", "H", 64),
        ("--cfg_scale 5", "scale", 5.0),
        ("--guidance-scale 5", "scale", 5.0),
        ("-C7.5", "scale", 7.5),
        ("--C 4", "C", 4),
        ("--model m.ckpt", "ckpt", "m.ckpt"),
        ("-o there", "outdir", "there"),
        ("--output there", "outdir", "there"),
        ("-p cube", "prompt", "cube"),
        ("-n 4", "n_samples", 4),
        ("-S 7", "seed", 7),
        ("-A plms", "sampler", "plms"),
        ("--sampler DPM-Solver", "sampler", "dpm_solver"),
        ("--negative-prompt dull", "negative_prompt", "dull"),
        ("--from_file list", "from_file", "list"),
        ("--prompt=--steps", "prompt", "--steps"),
        ("--seed ١٢", "seed", 12),
        ("--seed 1_0", "seed", 10),
    ],
)
def test_other_spellings(typed, name, value):
    assert vars(txt2img.parser().parse_args(typed.split()))[name] == value


def test_short_options_of_a_picture_to_start_from():
    opt = img2img.parser().parse_args(["-I", "a.png", "-f", "0.5"])
    assert (opt.init_img, opt.strength) == (["a.png"], 0.5)


@pytest.mark.parametrize("short", ["pro", "out", "see", "fi", "pre", "from", "sc", "n_s", "conf"])
def test_what_was_unique_among_the_originals_options_can_be_shortened(short):
    assert txt2img.parser()._own_name(f"--{short}=1").partition("=")[0][2:].startswith(short)


def test_values_are_never_read_as_options():
    opt = txt2img.parser().parse_args(
        [
            "--prompt",
            "-p is a word of --promt",
            "--",
        ][:2]
    )
    assert opt.prompt == "-p is a word of --promt"


def test_files_and_options_may_alternate():
    assert parser_of("replay").parse_args(["a.png", "--seed", "5", "b.png"]).files == ["a.png", "b.png"]


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["--promt", "x"], "unknown option --promt, did you mean --prompt?"),
        (["--ddim_stpes", "5"], "did you mean --ddim_steps?"),
        (["--stpes", "5"], "did you mean --steps?"),
        (["--promt", "x", "--seeed", "5"], "--prompt?; unknown option --seeed, did you mean --seed?"),
        (
            ["--sampler", "plsm"],
            "--sampler: 'plsm' is unknown (did you mean plms?); choose ddim, plms, dpm_solver, ",
        ),
        (["--init_img", "a.png"], "--init_img is an option of img2img.py and inpaint.py"),
        (["--n", "5"], "--n can be --n_iter, --n_rows, --n_samples, --neg"),
        (["-n", "blurry"], "'blurry' is not a whole number; what to keep away from is a --negative_prompt"),
        (["--seed", "5.5"], "--seed: '5.5' is not a whole number"),
        (["--scale", "five"], "--scale: 'five' is not a number"),
        (["--ckpt", ""], "--ckpt is empty; is a variable of the shell not set?"),
        (["--lora", ""], "--lora: the name is empty"),
        (["a", "red", "cube"], 'unexpected: a red cube; put a prompt in quotes, as in --prompt "a red cube"'),
        (["--prompt"], "--prompt needs a value"),
        (["--prompt", "--seed", "5"], "--prompt needs a value"),
        (["--prompt", "-x"], 'unknown option -x; as the value of --prompt write --prompt="-x"'),
        (["--\x1b[2J"], "unexpected: --\\x1b[2J"),
    ],
    ids=" ".join,
)
def test_what_is_wrong_is_one_line(capsys, typed, said):
    assert said in refusal(capsys, txt2img.parser(), *typed)


def test_a_missing_option_does_not_hide_a_misspelt_one(capsys):
    assert "did you mean --init-img?" in refusal(capsys, img2img.parser(), "--ini_img", "a.png")
    assert "--init-img is missing" in refusal(capsys, img2img.parser())


def test_samplers_by_name_and_by_switch():
    assert set(txt2img.parser()._option_string_actions["--sampler"].choices) == set(SOLVERS)
    chosen = {"--sampler plms": "plms", "--plms": "plms", "--plms --sampler plms": "plms", "": "ddim"}
    for typed, name in chosen.items():
        assert chosen_sampler(txt2img.parser().parse_args(typed.split())) == name
    with pytest.raises(InputError, match="--plms and --sampler ddim contradict"):
        chosen_sampler(txt2img.parser().parse_args(["--plms", "--sampler", "ddim"]))


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_is_short_at_first_and_ends_with_three_examples_that_parse(name):
    parser = parser_of(name)
    assert len(parser.format_usage().splitlines()) == 1
    text = parser.format_help().partition("examples:\n")[2].splitlines()
    assert len(text) == 3
    import shlex

    for line in text:
        python, script, *typed = shlex.split(line)
        assert (python, script) == ("python", f"scripts/{name}.py")
        parser.parse_args(typed)


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_option_has_help_and_the_version_has_a_name(name, capsys):
    parser = parser_of(name)
    assert all(action.help for action in parser._actions)
    with pytest.raises(SystemExit):
        parser.parse_args(["--version"])
    assert capsys.readouterr().out == "ldm 0.1.0\n"


# --- missing packages and files -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_can_be_read_by_older_pythons(name):
    for path in (f"scripts/{name}.py", "ldm/__init__.py", "ldm/cli/__init__.py"):
        ast.parse((ROOT / path).read_text(), feature_version=(3, 8))
    first = (ROOT / f"scripts/{name}.py").read_text().split("from ldm")
    assert first[1].startswith(".cli.")  # where the version is checked, before newer syntax is read


def test_an_older_python_is_named(monkeypatch, capsys):
    monkeypatch.setattr(sys, "version_info", (3, 9, 2))
    with pytest.raises(SystemExit) as caught:
        exec((ROOT / "ldm/cli/__init__.py").read_text(), {})
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: Python 3.9 is too old; use Python 3.10 or newer\n"


@contextmanager
def imported_again(module):
    """`module` and what lies in it are imported anew inside, and are the former ones again after it."""
    former = {name: held for name, held in sys.modules.items() if name.split(".")[0] == "ldm"}
    for name in former:
        if name == module or name.startswith(f"{module}."):
            del sys.modules[name]
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "ldm"]:
            package, _, own = name.rpartition(".")
            del sys.modules[name]
            if package in former:
                vars(former[package]).pop(own, None)
        sys.modules.update(former)
        for name, held in former.items():
            package, _, own = name.rpartition(".")
            if package:
                setattr(former[package], own, held)


NEEDS = {"benchmark": ("ldm.runtime.device", "torch"), "train": ("ldm.training", "pytorch_lightning")}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_missing_package_is_named(name, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    module, package = NEEDS.get(name, ("ldm.config", "omegaconf"))
    text = PngInfo()
    text.add_text("parameters", "a cube\nSteps: 2, Sampler: DDIM, CFG scale: 7, Seed: 5, Size: 64x64")
    Image.new("RGB", (64, 64)).save("a.png", pnginfo=text)
    with imported_again(module):  # else what it starts would run
        monkeypatch.setitem(sys.modules, package, None)
        assert importlib.import_module(f"scripts.{name}").main(TYPED.get(name, [])) == 2
    package = package.replace("_", "-")
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .endswith(
            f"the package {package} is not installed: activate your environment, or run: pip install -e ."
        )
    )


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ModuleNotFoundError("No module named 'PIL'", name="PIL"), "the package pillow is not installed"),
        (
            ModuleNotFoundError("no", name="pytorch_lightning.callbacks"),
            "the package pytorch-lightning is not",
        ),
        (ModuleNotFoundError("no", name="_lzma"), "this Python lacks its own module _lzma"),
        (ImportError("libGL.so.1: cannot open shared object file", name="cv2"), "libGL.so.1: cannot open"),
        (RuntimeError("could not create a primitive"), "out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9"), "out of memory"),
        (RuntimeError("CUDA error: device-side assert"), "the GPU failed"),
    ],
    ids=str,
)
def test_what_errors_mean(error, said, capsys):
    def fail():
        raise error

    set_up_messages(False, False)

    assert outcome(fail, debug=False) == (2 if isinstance(error, ImportError) else 1)
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert "bug" not in line


def test_a_package_that_a_target_needs_is_no_missing_target(monkeypatch):
    config = str(ROOT / BUNDLED_CONFIG)
    monkeypatch.delitem(sys.modules, "ldm.modules.diffusionmodules.openaimodel", raising=False)
    monkeypatch.delitem(sys.modules, "ldm.modules.attention", raising=False)
    monkeypatch.setitem(sys.modules, "einops", None)
    with pytest.raises(ModuleNotFoundError, match="einops"):
        read_config(config)


def test_a_target_that_is_missing_is_named(tmp_path):
    (tmp_path / "c.yaml").write_text("model: {target: ldm.models.nothing.Here}")
    with pytest.raises(ConfigError, match=r"a config cannot use ldm\.models\.nothing\.Here"):
        read_config(tmp_path / "c.yaml")


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["--ckpt", "link.ckpt"], "link.ckpt is a broken link to /no/such.ckpt"),
        (["--dry_run"], f"{V1_CKPT} is a broken link to /no/such.ckpt; link a checkpoint there"),
        (["--ckpt", "CompVis/stable-diffusion-v1-4"], "v1-4 does not exist; nothing is downloaded by name"),
        (["--ckpt", "runwayml/v1-5.ckpt"], "v1-5.ckpt does not exist; give another with --ckpt"),
        (
            ["--ckpt", str(Path(MODEL).parent)],
            "not in the layout of diffusers; give a file in it: control.safetensors, judge.pt, lcm.safetensors, "
            "model.ckpt, taesd.safetensors",
        ),
        (["--vae", "link.ckpt"], "link.ckpt is a broken link to /no/such.ckpt; give another --vae"),
        (["--embedding", "link.ckpt"], "link.ckpt is a broken link"),
        (["--lora", "link.ckpt"], "link.ckpt is a broken link"),
        (["--config", "page.yaml"], "page.yaml is not a mapping"),
        (["--config", "own.yaml"], "--config own.yaml needs its checkpoint; give it with --ckpt"),
    ],
    ids=" ".join,
)
def test_files_that_are_not_there(draw, capsys, tmp_path, typed, said):
    (tmp_path / V1_CKPT).parent.mkdir(parents=True)
    for link in ("link.ckpt", V1_CKPT) if typed != ["--config", "own.yaml"] else ():
        (tmp_path / link).symlink_to("/no/such.ckpt")
    (tmp_path / "page.yaml").write_text("hello: 1")
    (tmp_path / "own.yaml").write_text((ROOT / BUNDLED_CONFIG).read_text() + "# own\n")
    assert draw(*typed) == (2, [])
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_a_file_without_permission_is_bad_input(draw, capsys, tmp_path, monkeypatch):
    (tmp_path / "a.pt").write_bytes(b"x")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    for option in ("--lora", "--embedding"):
        assert draw(option, "a.pt")[0] == 2
        assert "a.pt cannot be read: Permission denied" in capsys.readouterr().err


def test_the_bundled_config_finds_its_checkpoint(draw):
    code, files = draw("--config", str(ROOT / BUNDLED_CONFIG))
    assert (code, files) == (0, ["00000.png"])


def test_a_missing_checkpoint_costs_no_import_of_torch(tmp_path):
    code = "import sys, scripts.txt2img as t; sys.exit(t.main(['--ckpt', 'no.ckpt']) != 2 or 'torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# --- streams and signals ------------------------------------------------------------------------------------


def test_closed_streams_do_not_stop_a_run(draw, monkeypatch):
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    code, files = draw()
    assert (code, files) == (0, ["00000.png"])


def test_no_file_takes_the_place_of_a_closed_stream():
    code = (
        "import os; from ldm.cli.app import fill_closed_streams as f; f(); os._exit(os.open('/dev/zero', 0))"
    )
    command = f'exec {sys.executable} -c "{code}" <&- >&- 2>&-'
    assert subprocess.run(command, shell=True, cwd=ROOT).returncode > 2


@pytest.mark.parametrize(("length", "code"), [(1, 0), (1, 1), (20_000, 0)])
def test_a_reader_of_stdout_that_leaves_is_no_fault(monkeypatch, length, code):
    """A short text is written at the end, when the task's exit code is known; a long one ends the task."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert outcome(lambda: print("x" * length) or (code if length == 1 else 1), debug=False) == code
        monkeypatch.undo()


def test_a_full_disk_below_stdout_is_one_line(monkeypatch, capsys):
    parser = make_parser("")
    add_report_options(parser)
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(parser, lambda opt: print("x") or 0, []) == 1
        monkeypatch.undo()
    assert capsys.readouterr().err == "error: No space left on device\n"


def test_an_interrupt_before_the_work_is_no_traceback(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", interrupted)
    assert txt2img.main([]) == 130
    assert capsys.readouterr().err == ""


def test_an_interrupt_during_the_start_waits_for_it():
    """The tuned restart blocks the signal, which the new process handles when it is ready."""
    code = (
        "import signal, os, sys; signal.pthread_sigmask(signal.SIG_BLOCK, {2}); os.kill(os.getpid(), 2); "
        "import scripts.txt2img as t; sys.exit(t.main(['--version']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def hang_up(monkeypatch, times):
    """The terminal closes while an image is drawn, this many times."""
    begin = Pipeline.begin

    def interrupted(*args):
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGHUP)
        return begin(*args)

    monkeypatch.setattr(Pipeline, "begin", interrupted)


def test_a_lost_terminal_ends_a_run_after_the_batch(draw, monkeypatch, capsys):
    hang_up(monkeypatch, 1)
    assert draw("--n_iter", "3") == (129, ["00000.png"])
    assert "run the same command with --resume" in capsys.readouterr().err


def test_a_second_signal_ends_a_run_at_once(draw, monkeypatch, tmp_path):
    hang_up(monkeypatch, 2)
    with pytest.raises(SystemExit) as caught:
        draw("--n_iter", "3")
    assert caught.value.code == 129
    assert not list(tmp_path.rglob("*.png"))


def test_without_a_terminal_nothing_is_written_twice_on_a_line(draw, capsys):
    draw("--n_iter", "2")
    txt2img.main([*FAST[:-1], "--outdir", "out"])
    error = capsys.readouterr().err
    assert "image 1 of 1" in error
    assert "\r" not in error


# --- odd values ---------------------------------------------------------------------------------------------


def test_an_empty_prompt_is_allowed(draw, tmp_path):
    assert draw("--prompt", "") == (0, ["00000.png"])
    assert read_job(str(tmp_path / "out/samples/00000.png")).job.prompt == ""


@pytest.mark.parametrize("scale", ["0", "-2", "1"])
def test_any_finite_scale_is_allowed(draw, scale, tmp_path):
    assert draw("--scale", scale) == (0, ["00000.png"])
    assert read_job(str(tmp_path / "out/samples/00000.png")).job.scale == float(scale)


@pytest.mark.parametrize("value", ["nan", "inf", "-0.5", "1e300", "10.5"])
def test_an_impossible_eta_is_refused(draw, value, capsys, tmp_path):
    assert draw(f"--ddim_eta={value}") == (2, [])
    (tmp_path / "list.txt").write_text(f"a cube --ddim_eta {value}")
    assert draw("--from-file", "list.txt") == (2, [])
    assert capsys.readouterr().err.count("give a number from 0 to 10") == 2


def test_an_eta_above_1_is_warned_of_wherever_it_is_said(draw, capsys, tmp_path):
    (tmp_path / "list.txt").write_text("a cube --ddim_eta 1.5")
    for typed in (["--ddim_eta", "1.5"], ["--from-file", "list.txt"], ["--sweep", "eta=0,1.5"]):
        assert draw(*typed)[0] == 0
        assert "warning: an eta of 1.5 is above 1" in capsys.readouterr().err


@pytest.mark.parametrize("seed", [2**64, 2**70, -3])
def test_impossible_seeds_are_refused(draw, seed, capsys):
    assert draw(f"--seed={seed}") == (2, [])
    assert f"--seed is {seed}; give" in capsys.readouterr().err


@pytest.mark.parametrize(("rows", "size"), [("-5", (134, 68)), (str(10**20), (134, 68)), ("1", (68, 134))])
def test_rows_of_a_grid_are_clamped(tmp_path, rows, size):
    options = [*FAST, "--outdir", str(tmp_path), "--n_samples", "2"]
    assert txt2img.main([*options, f"--n_rows={rows}"]) == 0
    assert Image.open(tmp_path / "grid-0000.png").size == size


def test_numbers_are_read_as_python_reads_them():
    opt = txt2img.parser().parse_args(["--seed", " 7 ", "--H", "١٢٨", "--W", "1_28"])
    assert (opt.seed, opt.H, opt.W) == (7, 128, 128)


@pytest.mark.parametrize("name", ["-x", "two\nlines", os.fsdecode(b"caf\xe9"), "\x1b[2J"])
def test_odd_names_of_folders_work_and_are_shown_escaped(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    assert txt2img.main([*FAST[:-1], f"--outdir={name}"]) == 0
    assert (tmp_path / name / "samples/00000.png").is_file()
    error = capsys.readouterr().err
    assert "\x1b" not in error
    assert f"in {printable(name)}" in error


# --- during a run -------------------------------------------------------------------------------------------


def test_a_gpu_that_fails_ends_the_run_and_keeps_what_is_finished(draw, monkeypatch, capsys):
    begin, tries = Pipeline.begin, []

    def failing(*args):
        tries.append(args)
        if len(tries) > 1:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return begin(*args)

    monkeypatch.setattr(Pipeline, "begin", failing)
    assert draw("--n_iter", "4", "--keep_going") == (1, ["00000.png"])
    assert len(tries) == 2
    assert "the GPU failed (CUDA error: an illegal memory access" in capsys.readouterr().err


def test_no_clock_is_in_an_image(draw, monkeypatch, tmp_path):
    draw()
    first = (tmp_path / "out/samples/00000.png").read_bytes()
    (tmp_path / "out/samples/00000.png").unlink()
    monkeypatch.setenv("TZ", "Pacific/Kiritimati")
    time.tzset()
    monkeypatch.setattr(time, "time", lambda: 4e9)
    draw()
    assert (tmp_path / "out/samples/00000.png").read_bytes() == first
    places, names = 8, set()
    while places < len(first):
        names.add(first[places + 4 : places + 8])
        places += 12 + int.from_bytes(first[places : places + 4], "big")
    assert names == {b"IHDR", b"tEXt", b"IDAT", b"IEND"}


def test_an_image_that_changes_during_a_run_is_refused(tmp_path):
    canvases, paths = (
        Canvases(mask_needed=False, model=small_config()),
        [tmp_path / f"{i}.png" for i in range(9)],
    )
    for path in paths:
        Image.new("RGB", (64, 64)).save(path)
        canvases(Init(str(path)))
    Image.new("RGB", (64, 64), "red").save(paths[0])
    with pytest.raises(InputError, match=r"0\.png has changed since this run began"):
        canvases(Init(str(paths[0])))


@pytest.mark.long
def test_an_image_beyond_memory_is_refused_before_it_is_sampled(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("ldm.runtime.memory.total_memory", lambda device: 2**30)
    Image.new("RGB", (3999, 3999)).save(tmp_path / "large.png", compress_level=1)
    options = ["--init-img", str(tmp_path / "large.png"), "--device", "cpu", "--n_samples", "1"]
    assert img2img.main([*options, "--outdir", str(tmp_path / "out"), "--quiet"]) == 2
    assert re.search("needs about [0-9.]+ GiB, and this machine has 1 GiB", capsys.readouterr().err)


def test_the_steps_that_a_strength_runs_are_printed(tmp_path, capsys):
    """0.29 of 100 is 28 in floating point, as in the original."""
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    options = [
        "--init-img",
        str(tmp_path / "a.png"),
        "--strength",
        "0.29",
        "--ddim_steps",
        "100",
        "--dry_run",
    ]
    assert img2img.main([*options, "--device", "cpu"]) == 0
    assert "strength 0.29: 28 of 100 steps" in capsys.readouterr().err


def test_the_bundled_model_is_known_by_its_content(tmp_path):
    copy = tmp_path / "any-name.ckpt"
    copy.symlink_to(ROOT / BUNDLED_CKPT)
    assert _config_of(copy) == BUNDLED_CONFIG


def test_what_a_model_does_not_do_well_is_noted(draw, capsys):
    typed = ["--prompt", "an astronaut riding three spheres", "--plms", "--steps", "2", "--upscale", "2"]
    assert draw(*typed, "--W", "128", "--H", "128", "--dry_run", "--debug")[0] == 0
    said = capsys.readouterr().err
    assert "trained at 128x128; at 256x256 objects may repeat" in said
    assert "PLMS needs about 50 steps, not 2" in said
    assert "does not know: astronaut, riding, three, spheres (" in said


def test_what_a_model_does_well_is_not_noted(draw, capsys):
    assert (
        draw(
            "--prompt",
            "a red cube on top of a blue sphere",
            "--plms",
            "--steps",
            "50",
            "--dry_run",
            "--debug",
        )[0]
        == 0
    )
    said = capsys.readouterr().err
    assert "may repeat" not in said and "PLMS needs" not in said and "does not know" not in said


def test_the_bundled_models_words_are_those_of_its_captions():
    said = (caption(scene_at(i, "train"), np.random.default_rng(i)) for i in range(4000))
    words = {word for text in said for word in re.findall("[a-z]+", text.lower())}
    assert sorted(words) == (ROOT / "models/ldm/shapes/words.txt").read_text().split()


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["--upscale_strength", "0.1"], "no effect without --upscale"),
        (["--prompt_format", "kohya"], "no effect without --from-file"),
        (["--from-file", "list.txt"], "--prompt has no effect with --from-file"),
        (["--n_rows", "-3"], "--n_rows -3 is below 0"),
        (["--sweep", "seed=1,2", "--n_iter", "2"], "makes the same images 2 times"),
    ],
)
def test_options_without_effect_are_warned_of(caplog, typed, said):
    check_options(txt2img.parser().parse_args(["--prompt", "a cube", *typed]))
    assert said in caplog.text


@pytest.mark.parametrize(
    ("script", "typed", "said"),
    [
        (
            txt2img,
            ["--negative_prompt", "fog", "--scale", "1"],
            "--negative_prompt has no effect at --scale 1",
        ),
        (txt2img, ["--guidance_interval_in", "sigma"], "--guidance_interval_in has no effect without"),
        (txt2img, ["--tiles", "on", "--W", "512", "--H", "256"], "--tiles on has no effect on images of up"),
        (txt2img, ["--skip_grid", "--n_rows", "2"], "--n_rows has no effect with --skip_grid"),
        (img2img, ["--init-img", "a.png", "--resize", "fit"], "--resize has no effect without --W or --H"),
        (inpaint, ["--mask_blur", "9", "--no_paste"], "--mask_blur has no effect with --no_paste"),
    ],
)
def test_each_half_of_a_pair_without_effect_is_silent_alone(caplog, script, typed, said):
    """The pair is warned of; with the disabling option given its other value, nothing is."""
    parser = script.parser()
    check_options(parser.parse_args(typed))
    assert said in caplog.text
    caplog.clear()
    cure = {
        "fog": ["--scale", "2"],
        "on": ["--upscale", "1.5"],
        "fit": ["--W", "64"],
        "sigma": ["--guidance_interval", "0,2"],
    }
    cured = [*typed, *(more for word in typed for more in cure.get(word, []))]
    check_options(parser.parse_args([word for word in cured if word not in ("--skip_grid", "--no_paste")]))
    assert "no effect" not in caplog.text


@pytest.mark.parametrize("word", ["-1", "random"])
def test_a_random_seed_is_printed_recorded_and_resumed(draw, capsys, tmp_path, word):
    typed = ["--prompt", "a cube", "--seed", word, "--steps", "1", "--n_samples", "2", "--debug"]
    assert draw(*typed)[0] == 0
    seed = int(re.search(r"seed (\d+) \(random\)", capsys.readouterr().err)[1])
    samples = sorted(tmp_path.glob("**/samples/*.png"))
    assert [job_from_infotext(Image.open(p).info["parameters"]).seed for p in samples] == [seed, seed + 1]
    whole = samples[1].read_bytes()
    samples[1].unlink()
    assert draw(*typed, "--resume")[0] == 0
    assert samples[1].read_bytes() == whole
