"""scripts/README.md lists every option of every script, as the parsers have them."""

import re

import pytest

from ldm.cli.commands import COMMANDS, generate
from tests.support.option_tables import PAGE, with_tables

TEXT = PAGE.read_text(encoding="utf-8")


def test_the_tables_are_those_of_the_parsers():
    assert with_tables(TEXT) == TEXT, "run: python -m tests.support.option_tables"


@pytest.mark.parametrize(
    "parser", [generate.txt2img_parser, generate.img2img_parser, generate.inpaint_parser]
)
def test_every_option_that_help_shows_is_in_the_page(parser):
    """Read out of the help itself, which argparse lays out."""
    shown = re.findall(r"^  (--[\w-]+)", parser().format_help(), re.MULTILINE)
    assert len(shown) > 50 and {*shown} - {"--help"} <= {*re.findall(r"\| `(--[\w-]+)", TEXT)}


def test_an_option_that_changes_makes_the_page_old(monkeypatch):
    def changed():
        parser = original()
        parser.add_argument("--brightness", metavar="X", default=3, help="how bright|dark")
        return parser

    original = generate.txt2img_parser
    monkeypatch.setattr(generate, "txt2img_parser", changed)
    line = next(line for line in with_tables(TEXT).splitlines() if "--brightness" in line)
    assert line == "| `--brightness X` | how bright\\|dark | `3` | - | - | - |"


def test_the_page_names_every_command():
    assert [name for name in COMMANDS if f"`ldm {name}`" not in TEXT] == []
