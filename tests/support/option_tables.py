"""The tables of scripts/README.md, made from the parsers of the commands.

`python -m tests.support.option_tables` in the repository's root writes them into the page again.
"""

from __future__ import annotations

import argparse
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence

from ldm.cli.commands import (
    benchmark,
    convert,
    evaluate,
    evaluate_compare,
    evaluate_control,
    evaluate_lesson,
    evaluate_plot,
    evaluate_run,
    evaluate_score,
    evaluate_solvers,
    generate,
    inspect,
    replay,
    train,
    where,
)
from ldm.cli.parser import SAME
from tests.support.paths import ROOT

PAGE = ROOT / "scripts/README.md"
_TABLES = re.compile(r"(<!-- tables: begin -->\n).*(<!-- tables: end -->)", re.DOTALL)
_DEFAULT = re.compile(r" \(default: ([^()]*(?:\([^()]*\)[^()]*)*)\)$")


def _groups() -> Mapping[str, Mapping[str, argparse.ArgumentParser]]:
    """Parsers by heading and script; those with one heading share a table."""
    return {
        "txt2img.py, img2img.py, inpaint.py and replay.py": {
            "txt2img": generate.txt2img_parser(),
            "img2img": generate.img2img_parser(),
            "inpaint": generate.inpaint_parser(),
            "replay": replay.parser(),
        },
        "convert.py": {"convert": convert.parser()},
        "inspect_model.py": {"inspect": inspect.parser()},
        "benchmark.py": {"benchmark": benchmark.parser()},
        "evaluate.py": {"evaluate": evaluate.parser()},
        "evaluate.py run": {"run": evaluate_run.parser()},
        "evaluate.py score": {"score": evaluate_score.parser()},
        "evaluate.py plot": {"plot": evaluate_plot.parser()},
        "evaluate.py compare": {"compare": evaluate_compare.parser()},
        "evaluate.py solvers": {"solvers": evaluate_solvers.parser()},
        "evaluate.py lesson": {"lesson": evaluate_lesson.parser()},
        "evaluate.py control": {"lesson": evaluate_control.parser()},
        "train.py": {"train": train.parser()},
        "ldm where": {"where": where.parser()},
    }


def with_tables(page: str) -> str:
    """The text of the page with tables of the options as they are now."""
    tables = "\n".join(
        f"## {heading}\n\n{''.join(_table(parsers))}" for heading, parsers in _groups().items()
    )
    return _TABLES.sub(lambda found: f"{found[1]}\n{tables}\n{found[2]}", page)


def options_of(parser: argparse.ArgumentParser) -> Mapping[tuple[str, str], argparse.Action]:
    """The options and arguments that a parser's help lists, but for --help, by their names and what they do."""
    return {
        (_name(action), _help(action)[0]): action
        for action in parser._actions
        if action.help != argparse.SUPPRESS and not isinstance(action, argparse._HelpAction)
    }


def _table(parsers: Mapping[str, argparse.ArgumentParser]) -> Iterator[str]:
    yield _row(["option", "what it does", *(parsers if len(parsers) > 1 else ["default"])])
    yield _row(["---"] * (2 + len(parsers)))
    options = [options_of(parser) for parser in parsers.values()]
    for key in dict.fromkeys(itertools.chain.from_iterable(options)):
        found = [of_script.get(key) for of_script in options]
        first = next(filter(None, found))
        yield _row(
            [_spelling(first), key[1], *("-" if action is None else _default(action) for action in found)]
        )


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n"


def _name(action: argparse.Action) -> str:
    return action.option_strings[0] if action.option_strings else str(action.metavar or action.dest)


def _spelling(action: argparse.Action) -> str:
    name = _name(action)
    value = action.metavar or ",".join(map(str, action.choices or ()))
    own = f"`{name} {value}`" if action.option_strings and action.nargs != 0 and value else f"`{name}`"
    others = [other for names in SAME if name in names for other in names if other != name]
    return ", ".join([own, *(f"`{other}`" for other in others)])


def _help(action: argparse.Action) -> tuple[str, str]:
    """What an option does, and the default that its help names."""
    text = (action.help or "") % {**vars(action), "prog": ""}
    found = _DEFAULT.search(text)
    text, default = (text[: found.start()], found[1]) if found else (text, "")
    return re.sub(r"[<>]", lambda sign: f"\\{sign[0]}", text), default


def _default(action: argparse.Action) -> str:
    if default := _help(action)[1]:
        return default
    if action.nargs == 0 or action.default in (None, "", argparse.SUPPRESS, [], (0, 0, 0, 0)):
        return ""
    return f"`{action.default}`"


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
