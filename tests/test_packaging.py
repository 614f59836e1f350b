"""setup.py, environment.yaml and the README agree."""

import re
import subprocess
import sys
from functools import cache

import pytest
import yaml

from tests.support.paths import ROOT


@cache
def setup_metadata():
    """The arguments of setup(), from running setup.py with a replacement of setuptools' function."""
    script = (
        "import json, runpy, setuptools\n"
        "setuptools.setup = lambda long_description, **rest: print(json.dumps(rest, default=repr))\n"
        f"runpy.run_path({str(ROOT / 'setup.py')!r})"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    return yaml.safe_load(run.stdout)


def test_conda_says_what_pip_says():
    metadata = setup_metadata()
    environment = yaml.safe_load((ROOT / "environment.yaml").read_text())
    pip = next(entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    assert sorted(pip) == sorted([*metadata["install_requires"], "-e ."])
    named = {requirement.partition(">=")[0] for requirement in pip}
    assert {"transformers", "pytorch-lightning"} <= named


def test_every_range_has_both_ends():
    metadata = setup_metadata()
    extras = metadata["extras_require"].values()
    requirements = [*metadata["install_requires"], *(r for extra in extras for r in extra)]
    open_ended = [r for r in requirements if ">=" not in r or ("<" not in r and not r.startswith("regex"))]
    assert not open_ended


def test_no_version_with_a_published_hole_is_allowed():
    """CVE-2026-24747 (torch), CVE-2026-5241 (transformers) and CVE-2026-40192 (Pillow) end with these versions."""
    requirements = setup_metadata()["install_requires"]
    lowest = {name: version for r in requirements for name, version in re.findall(r"^([\w-]+)>=([\d.]+)", r)}
    for name, first_good in (("torch", (2, 10)), ("transformers", (5, 3)), ("pillow", (12, 2))):
        assert tuple(map(int, lowest[name].split("."))) >= first_good, name


def test_every_folder_of_the_package_is_installed():
    packages = set(setup_metadata()["packages"])
    folders = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "ldm").rglob("*.py")}
    assert folders <= packages


def test_the_readmes_two_commands_are_what_ci_runs():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"<!-- ci: (\w+) -->\n```bash\n(.*?)\n```", readme, re.DOTALL)
    assert [name for name, _ in blocks] == ["pictures", "tests"]
    assert all(command.strip() and "\n" not in command.strip() for _, command in blocks)
    assert "ci: " in (ROOT / ".ci/run").read_text()


TOP_LEVEL = {
    "LICENSE",
    "README.md",
    "configs",
    "environment.yaml",
    "ldm",
    "models",
    "scripts",
    "setup.py",
    "tests",
}


def tracked():
    run = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT)
    if run.returncode:
        pytest.skip("not a checkout of git")
    return run.stdout.splitlines()


def test_the_top_level_holds_what_it_should_and_dotfiles():
    names = {path.partition("/")[0] for path in tracked()}
    assert {name for name in names if not name.startswith(".")} == TOP_LEVEL


def test_nothing_is_installed_from_a_second_copy():
    """The data of the package are exactly the files in the repository's other folders."""
    metadata, known = setup_metadata(), {*tracked()}
    for package, folder in metadata["package_dir"].items():
        assert package.startswith("ldm.assets.") and package in metadata["packages"]
        patterns = metadata["package_data"][package]
        files = {str(path.relative_to(ROOT)) for p in patterns for path in (ROOT / folder).glob(p)}
        assert files and files <= known
        assert all(any((ROOT / folder).glob(pattern)) for pattern in patterns)
    assert {path for path in known if path.startswith("configs/")} <= {
        str(path.relative_to(ROOT)) for path in (ROOT / "configs").glob("*/*.yaml")
    }
    assert not any(path.startswith("ldm/assets") for path in known)


@pytest.mark.parametrize("command", ["ruff check", "ruff format", "pyright -p .pyrightconfig.json"])
def test_ci_the_hooks_and_the_guide_run_the_same_tools(command):
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repo["repo"] for repo in hooks] == ["local"]  # nothing is downloaded
    assert any(hook["entry"].startswith(command) for hook in hooks[0]["hooks"])
    for path in (".ci/run", ".github/CONTRIBUTING.md"):
        assert command in (ROOT / path).read_text(encoding="utf-8"), path
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yaml").read_text())
    assert workflow["jobs"]["ci"]["steps"][-1]["run"] == ".ci/run"


def test_the_version_has_a_section_in_the_changelog():
    version = setup_metadata()["version"]
    sections = re.findall(
        r"^## (\S+)", (ROOT / ".github/CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert sections[0] == "Unreleased" and version in sections
