"""What a script does before anything is drawn: spelling, missing packages, closed streams, early interrupts."""

import argparse
import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import scripts.img2img as img2img
import scripts.txt2img as txt2img
from ldm.cli.inputs import chosen_sampler
from ldm.cli.options import BUNDLED_CKPT, BUNDLED_CONFIG, V1_CKPT, add_report_options, make_parser
from ldm.cli.report import main, outcome, set_up_messages
from ldm.config import ConfigError, read_config
from ldm.pipeline import SAMPLERS
from ldm.util import InputError
from tests.test_txt2img import FAST

ROOT = Path(__file__).parent.parent
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
    """What is said of a command line that the parser refuses."""
    with pytest.raises(SystemExit) as caught:
        parser.parse_args([*typed])
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """Runs txt2img.py with the bundled model on a small image: exit code and files by name."""
    monkeypatch.chdir(tmp_path)

    def run(*options):
        code = txt2img.main([*FAST, "--outdir", "out", "--W", "64", "--H", "64", "--skip_grid", *options])
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
            "--sampler: 'plsm' is unknown (did you mean plms?); choose ddim, plms or dpm_solver",
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
    assert set(SAMPLERS) == set(txt2img.parser()._option_string_actions["--sampler"].choices)
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


# --- what is not there --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_can_be_read_by_older_pythons(name):
    for path in (f"scripts/{name}.py", "ldm/__init__.py", "ldm/cli/__init__.py"):
        ast.parse((ROOT / path).read_text(), feature_version=(3, 8))
    first = (ROOT / f"scripts/{name}.py").read_text().split("from ldm")
    assert first[1].startswith(" import cli")


def test_an_older_python_is_named(monkeypatch, capsys):
    monkeypatch.setattr(sys, "version_info", (3, 9, 2))
    with pytest.raises(SystemExit) as caught:
        exec((ROOT / "ldm/cli/__init__.py").read_text(), {})
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: Python 3.9 is too old; use Python 3.10 or newer\n"


NEEDS = {"benchmark": ("ldm.runtime.device", "torch"), "train": ("ldm.training.stages", "pytorch_lightning")}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_missing_package_is_named(name, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    module, package = NEEDS.get(name, ("ldm.config", "omegaconf"))
    text = PngInfo()
    text.add_text("parameters", "a cube\nSteps: 2, Sampler: DDIM, CFG scale: 7, Seed: 5, Size: 64x64")
    Image.new("RGB", (64, 64)).save("a.png", pnginfo=text)
    monkeypatch.delitem(sys.modules, module, raising=False)
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
    with pytest.raises(ConfigError, match=r"there is no ldm\.models\.nothing\.Here"):
        read_config(tmp_path / "c.yaml")


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["--ckpt", "link.ckpt"], "link.ckpt is a broken link to /no/such.ckpt"),
        (["--dry_run"], f"{V1_CKPT} is a broken link to /no/such.ckpt; link a checkpoint there"),
        (["--vae", "link.ckpt"], "link.ckpt is a broken link to /no/such.ckpt; give another --vae"),
        (["--embedding", "link.ckpt"], "link.ckpt is a broken link"),
        (["--lora", "link.ckpt"], "link.ckpt is a broken link"),
        (["--config", "page.yaml"], "page.yaml is no mapping"),
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
    code, files = draw("--H", "64", "--W", "64", "--skip_grid")
    assert (code, files) == (0, ["00000.png"])


def test_no_file_takes_the_place_of_a_closed_stream():
    code = "import os; from ldm.cli.report import fill_closed_streams as f; f(); os._exit(os.open('/dev/zero', 0))"
    command = f'exec {sys.executable} -c "{code}" <&- >&- 2>&-'
    assert subprocess.run(command, shell=True, cwd=ROOT).returncode > 2


def test_a_reader_of_stdout_that_leaves_changes_no_code(monkeypatch):
    for code in (0, 1):
        reader, writer = os.pipe()
        os.close(reader)
        with os.fdopen(writer, "w") as stdout:
            monkeypatch.setattr(sys, "stdout", stdout)
            assert outcome(lambda code=code: print("x") or code, debug=False) == code
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
    """The tuned restart blocks the signal, which the new process takes when it can answer."""
    code = (
        "import signal, os, sys; signal.pthread_sigmask(signal.SIG_BLOCK, {2}); os.kill(os.getpid(), 2); "
        "import scripts.txt2img as t; sys.exit(t.main(['--version']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
