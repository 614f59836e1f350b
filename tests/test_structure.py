"""Packages import one another in one direction only, heavy modules only when needed; tests import no other test."""

import ast
import re
import subprocess
import sys
from collections import Counter
from functools import cache

import pytest

from tests.support.paths import ROOT

FILES = sorted((ROOT / "ldm").rglob("*.py"))
RANKS = [
    {"util", "job", "lr_scheduler", "former"},
    {"files", "json_value", "scaled", "seeds", "setting"},
    {"field", "places", "plots"},
    {"config"},
    {"modules"},
    {"models"},
    {"fields"},
    {"checkpoints", "runtime", "prompts", "images", "job_values"},
    {"metadata", "safety"},
    {"pipeline"},
    {"runs"},
    {"cli"},
    {"benchmark"},
    {"data"},
    {"training"},
    {"evaluation", "finetuning"},
    {"commands"},
    {"__main__"},
]
# these are separate from the pipeline: only the commands that train and measure import them
SEPARATE = {"data", "training", "evaluation", "finetuning"}
MAY_IMPORT_SEPARATE = {*SEPARATE, "commands"}


def rank(room):
    return next(i for i, rooms in enumerate(RANKS) if room in rooms)


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def room_of(path):
    """The package of a file; the subcommands, which run everything else, count as a package above all others."""
    return room_at(path.relative_to(ROOT / "ldm").with_suffix("").parts)


@cache
def source(path):
    return path.read_text(encoding="utf-8")


@cache
def parsed(path):
    return ast.parse(source(path))


def room_at(parts):
    return "commands" if parts[:2] == ("cli", "commands") else parts[0]


def only_for_types(tree):
    """The nodes that run in type checkers alone: those below `if TYPE_CHECKING`."""
    blocks = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    return {id(inner) for block in blocks for inner in ast.walk(block)}


def imported_rooms(path):
    tree = parsed(path)
    # the package itself names a few classes, which it imports when they are first used
    left_out = only_for_types(tree) if room_of(path) == "__init__" else set()
    for node in ast.walk(tree):
        if id(node) in left_out:
            continue
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names = [node.module or ""]
        for name in names:
            parts = name.split(".")
            if parts[0] == "ldm" and len(parts) > 1:
                yield room_at((*parts[1:], *(alias.name for alias in node.names)))


def may_import(room, other):
    if room == "__init__":
        return other == "former"
    separate = other in SEPARATE and room not in MAY_IMPORT_SEPARATE
    return (other == room or rank(other) < rank(room)) and not separate


def test_imports_point_downwards():
    found = {(name_of(path), other) for path in FILES for other in imported_rooms(path)}
    assert [(name, other) for name, other in found if not may_import(room_of(ROOT / name), other)] == []
    assert ("ldm/pipeline/pipeline.py", "models") in found


MAX_LINES, MAX_CLASS_LINES, MAX_IMPORTS = 400, 250, 25
# classes whose attributes and methods other people's code uses, as the original has them
PUBLISHED_CLASSES = {"ldm.models.diffusion.sampler.Sampler"}


def import_count(tree):
    """The import statements of a module, wherever they are; `from __future__` is not counted."""
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    return sum(getattr(node, "module", "") != "__future__" for node in imports)


def long_classes(tree):
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    return {node.name for node in classes if node.end_lineno - node.lineno >= MAX_CLASS_LINES}


def test_a_module_is_short_and_imports_little():
    """One that is not does two things: divide it."""
    assert [name_of(path) for path in FILES if len(source(path).splitlines()) > MAX_LINES] == []
    assert [name_of(path) for path in FILES if import_count(parsed(path)) > MAX_IMPORTS] == []


def test_no_class_is_long_but_the_published_ones():
    found = set()
    for path in FILES:
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        found |= {f"{module}.{name}" for name in long_classes(parsed(path))}
    assert found == PUBLISHED_CLASSES


def test_imports_of_functions_and_of_type_checkers_count():
    code = "from __future__ import annotations\nimport a, b\nif TYPE_CHECKING:\n    from c import d\n"
    assert (
        import_count(ast.parse(code + "def f():\n    from e import (\n        g,\n        h,\n    )\n")) == 3
    )
    assert long_classes(ast.parse("class A:\n" + "    x = 0\n" * 250)) == {"A"}
    assert long_classes(ast.parse("class A:\n" + "    x = 0\n" * 249)) == set()


def prints(path):
    """Whether a module prints, or knows what was typed on a command line."""
    nodes = [*ast.walk(parsed(path))]
    called = {n.func.id for n in nodes if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    imported = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
    typed = re.search(r"\bNamespace\b|\bopt\b", source(path))
    return bool({"print", "input"} & called or "argparse" in imported or typed)


def test_only_the_command_line_prints_and_knows_what_was_typed():
    printing = {room_of(path) for path in FILES if prints(path)}
    assert {"cli"} <= printing <= {"cli", "commands", "benchmark"}


def modules_after(*codes):
    """The top-level modules that a process has imported after each of these codes, which it runs in turn."""
    parts = [
        f"import sys; sys.path.insert(0, {str(ROOT)!r})",
        *(f"{code}\nprint(*sys.modules)" for code in codes),
    ]
    command = [sys.executable, "-c", "\n".join(parts)]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    return [{name.partition(".")[0] for name in line.split()} for line in run.stdout.splitlines()]


def test_the_package_alone_imports_nothing():
    before, after = modules_after("", "import ldm")
    assert after - before - set(sys.stdlib_module_names) == {"ldm"}
    script = "import sys, ldm; print(sorted(name for name in sys.modules if name.startswith('ldm')))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout == "['ldm', 'ldm.former']\n"


def test_help_imports_nothing_heavy():
    code = "import scripts.txt2img\nscripts.txt2img.parser().format_help()"
    heavy = {"torch", "numpy", "omegaconf", "PIL", "einops", "tqdm"}
    of_a_run = {"tempfile", "subprocess", "concurrent", "secrets"}  # in what starts and plans runs
    (imported,) = modules_after(code)
    assert not (heavy | of_a_run) & imported


# what a run needs, and what that needs
RUN_NEEDS = {"PIL", "einops", "ldm", "numpy", "omegaconf", "regex", "scripts", "tokenizers", "torch", "tqdm"}
THEY_NEED = {"antlr4", "attr", "clip", "cython_runtime", "packaging", "torchgen", "typing_extensions", "yaml"}


@pytest.mark.long
def test_a_run_imports_no_more_than_it_uses_and_no_module_what_few_runs_use(tmp_path):
    """With the bundled model: no training framework, no OpenCV, no second model library.

    No module of ldm imports these, but for the one that is transformers' tokenizer, which only other people's code
    asks for.
    """
    options = ["--outdir", str(tmp_path), "--no_watermark", "--ddim_steps", "1", "--device", "cpu", "--quiet"]
    code = (
        f"import scripts.txt2img\nscripts.txt2img.main({[*options, '--n_iter', '1', '--n_samples', '1']!r})"
    )
    core = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in FILES
        if room_of(path) not in SEPARATE and path.name not in ("__init__.py", "transformers_tokenizer.py")
    ]
    by_run, by_all = modules_after(code, "\n".join(f"import {name}" for name in core))
    assert (tmp_path / "samples/00000.png").is_file()
    imported = {name for name in by_run if not name.startswith("_")}
    assert imported - set(sys.stdlib_module_names) <= RUN_NEEDS | THEY_NEED
    heavy = {"pytorch_lightning", "transformers", "diffusers", "cv2", "kornia", "matplotlib", "imwatermark"}
    assert not heavy & by_all


TESTS = sorted((ROOT / "tests").rglob("test_*.py"))
# not those of a virtual environment in the same folder
PAGES = [
    ROOT / "README.md",
    *sorted(
        p for name in ("ldm", "models", "scripts", "tests", ".github") for p in (ROOT / name).rglob("*.md")
    ),
]


def test_no_test_imports_another():
    """Shared helpers are in tests/support."""
    pattern = re.compile(r"^.*import.*\btest_.*|^.*\btests\.(?!support\b).*import.*", re.MULTILINE)
    assert [(name_of(path), found) for path in TESTS for found in pattern.findall(source(path))] == []


def test_each_name_of_a_test_file_is_used_once():
    names = Counter(path.name for path in TESTS)
    assert [name for name, count in names.items() if count > 1] == []


def test_the_folders_of_tests_are_those_of_the_package():
    rooms = {path.relative_to(ROOT / "ldm").parts[0] for path in (ROOT / "ldm").glob("*/**/*.py")}
    folders = {path.parent.relative_to(ROOT / "tests").as_posix() for path in TESTS} - {"."}
    assert folders == rooms - {"__pycache__"}


def anchors(page):
    """The anchors that GitHub gives to the headings of a page."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


def broken_links(page):
    """The relative links of a page whose file, or heading in it, does not exist."""
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"https?://", link):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            yield link


def missing_names(page):
    """The paths in a page, from the root or in code from its folder, and the names in them, that do not exist."""
    text = page.read_text(encoding="utf-8")
    paths = re.findall(r"(?<![\w./-])((?:ldm|tests|scripts|configs)/[\w./-]*\w)", text)
    in_code = re.findall(r"`([\w./-]*\w\.py)(?::(\w+))?`", text)
    in_paths = [(name, "") for name in re.findall(r"(?<![\w./-])((?:\w+/)+\w+\.py)", text)]
    for name in paths:
        if not (ROOT / name).exists():
            yield name
    for name, member in in_code + in_paths:
        places = [ROOT / name, page.parent / name, ROOT / "ldm" / name, ROOT / "scripts" / name]
        files = [p for p in (*places, *(p for p in TESTS if p.name == name)) if p.is_file()]
        if not files or (member and not re.search(rf"^(class |def )?{member}\b", files[0].read_text(), re.M)):
            yield f"{name}:{member}"


def test_each_link_and_path_of_a_page_exists():
    assert [(name_of(page), link) for page in PAGES for link in broken_links(page)] == []
    assert [(name_of(page), name) for page in PAGES for name in missing_names(page)] == []


def test_what_a_page_names_and_does_not_exist_is_found(tmp_path):
    page = tmp_path / "README.md"
    page.write_text(
        "# A *Title*, here\n[a](#a-title-here) [b](#b) [c](no.md) [d](https://example.org)\n"
        "ldm/job.py, ldm/none.py, `job.py:Job`, `job.py:Jab`, `none.py`, cli/none.py\n"
    )
    assert [*broken_links(page)] == ["#b", "no.md"]
    assert [*missing_names(page)] == ["ldm/none.py", "job.py:Jab", "none.py:", "ldm/none.py:", "cli/none.py:"]


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 180


def test_the_readme_of_the_architecture_has_every_room_at_its_rank():
    page = (ROOT / "ldm/README.md").read_text(encoding="utf-8")
    table = page[page.index("| rank | room") : page.index("## Three paths through the code")]
    listed, number = [set() for _ in RANKS], 0
    for row in table.splitlines()[2:]:
        _, rank_cell, rooms, *_ = row.split("|") if row else ("", "", "")
        number = int(rank_cell) if rank_cell.strip() else number
        listed[number - 1] |= set(re.findall(r"`ldm/(?:cli/(?=commands))?(\w+)(?:\.py)?`", rooms))
    assert listed == RANKS
