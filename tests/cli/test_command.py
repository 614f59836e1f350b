"""The command `ldm`: its subcommands, those of the scripts, and its restart."""

import ast
import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from PIL import Image

from ldm.cli import commands
from ldm.cli.commands import COMMANDS
from tests.support.paths import ROOT

RENAMED = {"inspect": "inspect_model"}  # scripts whose names differ from the subcommand's
SCRIPTS = {name: RENAMED.get(name, name) for name in COMMANDS if name != "where"}  # it came with the command
FAST = [
    "--steps",
    "1",
    "--W",
    "64",
    "--H",
    "64",
    "--n_samples",
    "1",
    "--device",
    "cpu",
    "--skip_grid",
    "--quiet",
]


def run_module(*typed, cwd=ROOT, **environment):
    """Runs `python -m ldm` in a separate process."""
    return subprocess.run(
        [sys.executable, "-m", "ldm", *typed],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize("typed", [[], ["--help"], ["-h"]], ids=str)
def test_help_lists_every_subcommand_in_a_line(capsys, typed):
    with pytest.raises(SystemExit) as caught:
        commands.main(typed)
    assert caught.value.code == 0
    listed = capsys.readouterr().out.partition("commands:\n")[2].partition("\n\n")[0].splitlines()
    assert [line.split()[0] for line in listed] == list(COMMANDS)
    assert all(len(line) <= 80 for line in listed)


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        ("txt2mg", "error: COMMAND: 'txt2mg' is unknown (did you mean txt2img?); choose txt2img, "),
        ("inspect_model", "error: COMMAND: 'inspect_model' is unknown (did you mean inspect?); choose "),
        ("--promt", "error: unknown option --promt; --help lists the options"),
        ("--", "error: COMMAND is missing; --help lists the options"),
    ],
)
def test_what_is_no_subcommand_is_one_line(capsys, typed, line):
    with pytest.raises(SystemExit) as caught:
        commands.main([typed, "--prompt", "a cube"])
    assert caught.value.code == 2
    (written,) = capsys.readouterr().err.splitlines()
    assert written.startswith(line)


@pytest.mark.parametrize("name", SCRIPTS)
def test_each_script_is_its_subcommand(name):
    script = import_module(f"scripts.{SCRIPTS[name]}")
    module = import_module(f"ldm.cli.commands.{COMMANDS[name].module}")
    assert script.main is getattr(module, COMMANDS[name].function)
    options = {option for action in script.parser()._actions for option in action.option_strings}
    assert {"--version", "--debug"} <= options


def test_scripts_differ_in_nothing_but_the_subcommand():
    """The few lines that find the checkout are the same in each script."""
    texts = set()
    for path in (ROOT / "scripts").glob("*.py"):
        tree = ast.parse(path.read_text())
        tree.body = [
            node
            for node in tree.body[1:]
            if not (isinstance(node, ast.ImportFrom) and str(node.module).startswith("ldm."))
        ]
        texts.add(ast.unparse(tree))
    assert len(texts) == 1
    assert {path.stem for path in (ROOT / "scripts").glob("*.py")} == {*SCRIPTS.values()}


def test_a_fault_of_a_subcommand_is_one_line_with_its_exit_code(capsys):
    assert commands.main(["txt2img", "--ckpt", "none.ckpt"]) == 2
    assert capsys.readouterr().err == "error: none.ckpt does not exist; give another with --ckpt\n"


def test_the_module_is_the_command(tmp_path):
    done = run_module("txt2img", "--help", cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert done.stdout.startswith("usage: ldm txt2img --prompt TEXT [options]\n")
    assert "\n  ldm txt2img --prompt " in done.stdout and "scripts/" not in done.stdout
    assert run_module("--version").stdout == "ldm 0.1.0\n"


def test_help_of_a_subcommand_imports_nothing_heavy():
    code = (
        "import sys\nfrom ldm.cli.commands import main\n"
        "try:\n    main(['txt2img', '--help'])\nexcept SystemExit:\n"
        "    print('|', *({'torch', 'numpy', 'omegaconf', 'PIL', 'tqdm'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.endswith("|\n")


# --- restarting ---------------------------------------------------------------------------------------------


@pytest.fixture
def starts(tmp_path):
    """The installed command, in a process whose interpreters record how they were started."""
    (tmp_path / "sitecustomize.py").write_text(
        "import json, os, sys\n"
        f"with open({str(tmp_path / 'starts')!r}, 'a') as file:\n"
        "    facts = {'argv': sys.orig_argv[1:], 'malloc': os.environ.get('LDM_MALLOC')}\n"
        "    facts['rank'] = os.environ.get('LOCAL_RANK')\n"
        "    file.write(json.dumps(facts) + '\\n')\n"
    )
    command = tmp_path / "bin/ldm"
    command.parent.mkdir()
    command.write_text("import sys\nfrom ldm.cli.commands import main\nsys.exit(main())\n")
    usual = {
        name: value for name, value in os.environ.items() if name not in ("LDM_MALLOC", "GLIBC_TUNABLES")
    }

    def run(*typed):
        paths = os.pathsep.join([str(tmp_path), str(ROOT)])
        done = subprocess.run(
            [sys.executable, str(command), *typed],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**usual, "PYTHONPATH": paths},
        )
        noted = [json.loads(line) for line in Path(tmp_path, "starts").read_text().splitlines()]
        return done, [start for start in noted if start["argv"] == [str(command), *typed]]

    return run


@pytest.mark.skipif(sys.platform != "linux", reason="the allocator is glibc's")
def test_the_command_starts_itself_again_with_its_allocator(starts):
    done, noted = starts("txt2img", "--ckpt", "none.ckpt")
    assert (done.returncode, done.stderr) == (
        2,
        "error: none.ckpt does not exist; give another with --ckpt\n",
    )
    assert [start["malloc"] for start in noted] == [None, "tuned"]


@pytest.mark.slow
def test_several_processes_are_started_from_the_command(starts, tmp_path):
    done, noted = starts("txt2img", *FAST, "--n_iter", "2", "--devices", "2", "--outdir", "out")
    assert done.returncode == 0, done.stderr
    assert sorted(start["rank"] for start in noted if start["rank"]) == ["0", "1"]
    names = sorted(path.name for path in (tmp_path / "out/samples").iterdir())
    assert names == ["00000.png", "00001.png"]
    assert all(Image.open(tmp_path / "out/samples" / name).size == (64, 64) for name in names)
