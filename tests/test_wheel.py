"""An installed wheel is a working tool anywhere: no checkout, no network, no copies in the repository."""

import os
import platform
import shutil
import site
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch

from tests.support.paths import ROOT

PARTS = ("ldm", "configs", "models/ldm/shapes", "setup.py", "README.md", "LICENSE")
IMAGE = ["--prompt", "a red cube", "--steps", "2", "--n_iter", "1", "--n_samples", "1", "--seed", "7",
         "--device", "cpu", "--skip_grid", "--quiet", "--outdir", "out"]  # fmt: skip

pytestmark = pytest.mark.slow


def run(*command, cwd):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, cwd=cwd, env=environment | {"PIP_NO_INDEX": "1"}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def new_environment(folder: Path, *install: str) -> Path:
    """The folder of the commands of a new environment: this package, and those that the tests run with."""
    venv.create(folder, with_pip=False)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "others.pth").write_text("\n".join(site.getsitepackages()))
    pip = (sys.executable, "-m", "pip", f"--python={folder / 'bin/python'}", "install", "--no-deps")
    run(*pip, "--no-build-isolation", "--ignore-installed", *install, cwd=folder)
    return folder / "bin"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the sources, into which the build writes its files."""
    folder = tmp_path_factory.mktemp("source")
    for part in PARTS:
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        (folder / part).parent.mkdir(parents=True, exist_ok=True)
        copy(ROOT / part, folder / part)
    (folder / "models/ldm/own.ckpt").write_bytes(b"weights of the user's")
    return folder


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", folder)
    run(*pip, source, cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    return new_environment(tmp_path_factory.mktemp("installed"), str(wheel))


def test_an_installed_wheel_makes_the_same_image_as_the_checkout(installed, tmp_path):
    for folder, command in (
        ("wheel", [installed / "ldm", "txt2img"]),
        ("checkout", [sys.executable, ROOT / "scripts/txt2img.py"]),
    ):
        (tmp_path / folder).mkdir()
        run(*command, *IMAGE, cwd=tmp_path / folder)
    images = [(tmp_path / folder / "out/samples/00000.png").read_bytes() for folder in ("wheel", "checkout")]
    assert images[0] == images[1]


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64" or not shutil.which("gcc"), reason="no compiler"
)
def test_an_installed_wheel_has_the_compiled_library(installed, tmp_path):
    code = "from ldm.runtime import native; print(native.LIBRARY.is_file(), native.library() is not None)"
    found = run(installed / "python", "-c", code, cwd=tmp_path).split()
    assert found == ["True", str(torch.backends.cpu.get_cpu_capability() == "AVX512")]


def test_an_installed_wheel_finds_its_own_files_only(installed, tmp_path):
    code = (
        "import ldm; from ldm.places import find\n"
        "for name in ('models/ldm/shapes/model.ckpt', 'configs/shapes/judge.yaml', 'models/ldm/own.ckpt'):\n"
        "    print(find(name))"
    )
    model, config, own = run(installed / "python", "-c", code, cwd=tmp_path).splitlines()
    assert model.endswith("site-packages/ldm/assets/models/ldm/shapes/model.ckpt")
    assert Path(model).read_bytes() == (ROOT / "models/ldm/shapes/model.ckpt").read_bytes()
    assert Path(config).read_bytes() == (ROOT / "configs/shapes/judge.yaml").read_bytes()
    assert own == "models/ldm/own.ckpt"


def test_an_installed_wheel_offers_every_subcommand(installed, tmp_path):
    from ldm.cli.commands import COMMANDS

    for name in COMMANDS:
        assert run(installed / "ldm", name, "--help", cwd=tmp_path).startswith(f"usage: ldm {name} ")
    assert run(installed / "python", "-m", "ldm", "--version", cwd=tmp_path) == "ldm 0.1.0\n"


def test_an_editable_install_uses_the_folders_of_its_checkout(source, tmp_path):
    commands = new_environment(tmp_path / "editable", "--editable", str(source))
    code = (
        "from ldm.places import find, folders; print(find('configs/shapes/text.yaml'), *folders(), sep='\\n')"
    )
    found, *names = run(commands / "python", "-c", code, cwd=tmp_path).splitlines()
    assert Path(found) == source / "configs/shapes/text.yaml"
    assert names == ["current folder", "checkout", "user folder"]
    assert run(commands / "ldm", "--version", cwd=tmp_path) == "ldm 0.1.0\n"
