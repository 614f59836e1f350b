"""Text is in the words of the field: docstrings, comments, messages and pages have none of the retired words."""

import ast
import io
import re
import tokenize

import pytest

from tests.support.paths import ROOT

RETIRED = {
    "says, said": r"\b[Ss]a(?:ys|id)\b",
    "behind": r"\bbehind\b",
    "is no X": r"(?<![Tt]here )\b(?:is|are) no (?!longer\b|more\b|other\b)\w",
    "stands": r"\b(?:stands? (?:for|in|before|behind)|stood)\b",
    "lies": r"\b(?:lies?|lay)\b",
    "beside": r"\bbeside\b",
    "tells, told": r"\b(?:tells?|told)\b",
    "is taken": r"\b(?:is|are|was|were) taken\b",
    "picture": r"\bpictures?\b",
    "text tower": r"\b(?:text (?:tower|model)|tower)s?\b",
    "walk": r"\b[Ww]alk(?:s|ed|ing)?\b",
    "anew": r"\b(?:anew|made again)\b",
}
# what the bundled model was trained with, and what can be read of it
DATA = ("ldm/data/captions.py", "ldm/data/scenes.py", "ldm/data/vocabulary.py", "models/ldm/shapes/README.md")
# of phases of the benchmark, and of an entry of run files, and a former module
NAMES = {"picture", "pictures", "ldm.pipeline.picture"}

CODE = sorted([*(ROOT / "ldm").rglob("*.py"), *(ROOT / "scripts").glob("*.py")])
PAGES = [ROOT / "README.md", *sorted((ROOT / "ldm").rglob("*.md")), *sorted((ROOT / ".github").rglob("*.md"))]


def texts_of_code(source):
    """Every comment and text of a module, f-strings in their parts; names of files and entries are left out."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.string
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value not in NAMES:
            yield re.sub(r"`[^`\n]*`", "", node.value)


def retired_words(texts):
    return [
        (name, found[0], text.strip()[max(found.start() - 40, 0) : found.end() + 40])
        for text in texts
        for name, pattern in RETIRED.items()
        for found in re.finditer(pattern, text)
    ]


def undescribed(source):
    """Docstrings that begin with "What": they ask a question where they should name a thing."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docs = [ast.get_docstring(node) or "" for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
    return [doc for doc in docs if doc.startswith("What ")]


def faults(path):
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        joined = re.sub(r"""["']\s*\n\s*\w?["']""", "", text)
        suspect = retired_words([joined]) or '"What ' in text  # so that few files are parsed
        return retired_words(texts_of_code(text)) + undescribed(text) if suspect else []
    return retired_words([re.sub(r"`[^`\n]*`|<!--.*?-->", "", text)])


def test_no_retired_word_is_left():
    paths = {path.relative_to(ROOT).as_posix(): path for path in [*CODE, *PAGES]}
    assert [(name, fault) for name, path in paths.items() if name not in DATA for fault in faults(path)] == []


@pytest.mark.parametrize(
    "line",
    [
        "# it says so", 'x = f"{a} is no file"', '"""It stands for b."""', "# the value lies below", "# it is taken",
        "# beside it", "# a picture", "# text towers", "# we walk", "# made again",
    ],
)  # fmt: skip
def test_retired_words_are_found(line):
    assert len(retired_words(texts_of_code(line + "\n"))) == 1


def test_other_words_are_not():
    text = "# there is no file, and besides it none\npicture = 'picture'\nwalk(f'`picture.py` {picture}')\n"
    assert retired_words(texts_of_code(text)) == []
    assert undescribed('"""What it is."""\ndef f():\n    """Returns what it is."""\n') == ["What it is."]
