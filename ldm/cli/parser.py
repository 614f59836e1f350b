"""The spelling of options: one parser for all scripts, which accepts other programs' names and explains faults.

A hyphen and an underscore are the same in an option's name, names of other programs select the option here, and
abbreviations that are unique among the original's options are accepted as they were there. Code after the parser sees
only an option's canonical name.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NoReturn, Protocol, TypeVar

from ldm.util import printable

# Synonyms: InvokeAI's short ones, then those of other programs. A parser maps all to the one that it has.
SAME = (
    ("--prompt", "-p"),
    ("--negative_prompt", "--negative"),
    ("--ddim_steps", "--steps", "-s", "--num_inference_steps", "--sampling_steps"),
    ("--sampler", "-A", "--sampler_name", "--sampling_method"),
    ("--scale", "-C", "--cfg_scale", "--guidance_scale", "--cfg"),
    ("--ddim_eta", "--eta"),
    ("--seed", "-S"),
    ("--W", "-W", "--width"),
    ("--H", "-H", "--height"),
    ("--n_samples", "-n", "--batch_size", "--batch"),
    ("--n_iter", "--batch_count"),
    ("--init-img", "-I", "--init_image"),
    ("--strength", "-f", "--denoising_strength"),
    ("--mask", "--mask_image"),
    ("--ckpt", "--model", "--checkpoint"),
    ("--outdir", "-o", "--output", "--output_dir"),
)
_SHOWN = 2  # of an option's other names in --help

# the options of the original, which resolve abbreviations that later options would make ambiguous
_ORIGINAL = {
    *(
        "prompt",
        "outdir",
        "skip_grid",
        "skip_save",
        "ddim_steps",
        "plms",
        "laion400m",
        "fixed_code",
        "ddim_eta",
    ),
    *("n_iter", "H", "W", "C", "f", "n_samples", "n_rows", "scale", "from_file", "config", "ckpt", "seed"),
    *("precision", "init_img", "strength"),
}
# options that are often passed to scripts without them
_ELSEWHERE = {
    "init_img": "img2img.py and inpaint.py",
    "strength": "img2img.py and inpaint.py",
    "mask": "inpaint.py",
    "outpaint": "inpaint.py",
    "crop_to_mask": "inpaint.py",
    "image_scale": "img2img.py and inpaint.py",
}
_FILES = ("FILE", "DIR", "PATH")  # the metavars of options whose value is a name of an option
_NAME = re.compile(r"--?[A-Za-z][\w-]*")
_Kind = TypeVar("_Kind", int, float)


def _number(kind: Callable[[str], _Kind], what: str) -> Callable[[str], _Kind]:
    def read(text: str) -> _Kind:
        try:
            return kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}") from None

    return read


def _key(option: str) -> str:
    """Normalises an option's name: hyphens, underscores and leading dashes."""
    return option[2:].replace("-", "_") if option.startswith("--") else option


def _beginning(names: Mapping[str, str], key: str) -> list[str]:
    """Returns the options whose names begin with `key`."""
    return sorted({option for name, option in names.items() if name.startswith(key)})


def _one_of(names: Sequence[str]) -> str:
    return " or ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


_MEANINGS = {_key(name): names for names in SAME for name in names}


class Options(Protocol):
    """A parser, a group of its options, or options of which one excludes the others: options are added to it."""

    def add_argument(self, *names: str, **settings: Any) -> argparse.Action: ...


class Group(Options, Protocol):
    """A group of a parser's options."""

    def add_mutually_exclusive_group(self) -> Options: ...


class Parser(argparse.ArgumentParser):
    """Accepts every spelling of an option, and reports faults in one line."""

    def __init__(self, description: str, usage: str, examples: Sequence[str]) -> None:
        prog = os.path.basename(sys.argv[0])
        if prog.startswith("ldm "):  # the command, not a script of a checkout
            examples = [
                re.sub(r"^python (scripts/\w+\.py|-m ldm \w+)", prog, example) for example in examples
            ]
        super().__init__(
            prog=prog,
            description=description,
            usage=f"%(prog)s {usage}",
            epilog="\n  ".join(["examples:", *examples]) if examples else None,
            formatter_class=_Help,
        )
        self.register("type", int, _number(int, "a whole number"))
        self.register("type", float, _number(float, "a number"))

    def hide(self, names: Collection[str]) -> None:
        """Leaves the options with these attributes out of the help."""
        for action in self._actions:
            action.help = argparse.SUPPRESS if action.dest in names else action.help

    # --- reading ----------------------------------------------------------------------------------------------

    def parse_args(  # pyright: ignore[reportIncompatibleMethodOverride]  # no overloads
        self, args: Iterable[str] | None = None, namespace: Any = None
    ) -> Any:
        typed = self._spelt(sys.argv[1:] if args is None else [*args])
        self._refuse_unknown(typed)
        # positional arguments need not be adjacent: replay.py a.png --seed 5 b.png
        mixed = any(action.nargs in ("*", "+") for action in self._get_positional_actions())
        parse = self.parse_intermixed_args if mixed else super().parse_args
        parsed = parse(typed, namespace)
        self._refuse_empty(parsed)
        return parsed

    def parse_known_args(  # pyright: ignore[reportIncompatibleMethodOverride]  # no overloads
        self, args: Iterable[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        return super().parse_known_args(self._spelt(sys.argv[1:] if args is None else [*args]), namespace)

    def _spelt(self, typed: Sequence[str]) -> list[str]:
        """Returns the typed arguments with the options' canonical names."""
        end = typed.index("--") if "--" in typed else len(typed)
        return [*map(self._own_name, typed[:end]), *typed[end:]]

    def _own_name(self, typed: str) -> str:
        name, sign, value = typed.partition("=")
        if name in self._option_string_actions:
            return typed
        if option := self._find(name) if _NAME.fullmatch(name) else None:
            return f"{option}{sign}{value}"
        if glued := re.fullmatch(r"(-[A-Za-z])=?([-+.\d]\S*)", typed):  # as in -s50
            option = self._find(glued[1])
            if option and self._option_string_actions[option].type in (int, float):
                return f"{option}={glued[2]}"
        return typed

    def _find(self, name: str) -> str | None:
        """Finds the option of a name: a spelling of it, another program's name, or its beginning."""
        own, key = self._options(), _key(name)
        if key in own:
            return own[key]
        others = {_key(other): own[_key(names[0])] for names in self._names() for other in names}
        if key in others or not name.startswith("--"):
            return others.get(key)
        if found := _beginning(own, key):
            found = found if len(found) == 1 else [option for option in found if _key(option) in _ORIGINAL]
        else:
            found = _beginning(others, key)
        return found[0] if len(found) == 1 else None

    def _options(self) -> dict[str, str]:
        """Returns the long options, by normalised spelling."""
        return {_key(option): option for option in self._option_string_actions if option.startswith("--")}

    def _names(self) -> list[list[str]]:
        """Returns each option here that has synonyms, with those."""
        own = self._options()
        known = [[name for name in names if _key(name) in own] for names in SAME]
        return [
            [here[0], *(name for name in names if name not in here)]
            for here, names in zip(known, SAME, strict=True)
            if here
        ]

    # --- refusing ---------------------------------------------------------------------------------------------

    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ")
        if value := re.fullmatch(r"(\S+): expected (?:one|at least one) argument", message):
            message = f'{value[1]} needs a value; for one that begins with a dash: {value[1]}="-x"'
        elif required := re.fullmatch("the following arguments are required: (.*)", message):
            message = f"{required[1]} is missing"
        elif words := re.fullmatch("unrecognized arguments: (.*)", message, re.DOTALL):
            message = f"unexpected: {words[1]}"
            if "--prompt" in self._option_string_actions:
                message += '; put a prompt in quotes, as in --prompt "a red cube"'
        elif message.startswith("--n_samples: ") and "whole number" in message:
            message += "; what to keep away from is a --negative_prompt"
        end = "" if message.endswith("?") else "; --help lists the options"
        self.exit(2, f"error: {printable(message)}{end}\n")

    def _refuse_unknown(self, typed: Sequence[str]) -> None:
        """Exits with one line for every unknown option, whatever else is wrong."""
        end = typed.index("--") if "--" in typed else len(typed)
        unknown: dict[str, str] = {}
        for text, before in zip(typed[:end], ["", *typed], strict=False):
            name = text.partition("=")[0]
            if (
                _NAME.fullmatch(name)
                and name not in self._option_string_actions
                and not re.search(r"\s", text)
            ):
                unknown[name] = self._unknown(name, before)
        if unknown:
            self.error("; ".join(unknown.values()))

    def _unknown(self, name: str, before: str) -> str:
        own = self._options()
        begin_alike = _beginning(own, _key(name))
        if len(begin_alike) > 1 and name.startswith("--"):
            return f"{name} can be {_one_of(begin_alike)}"
        keys = [*own, *(_key(name) for names in self._names() for name in names[1:] if name.startswith("--"))]
        others = _MEANINGS.get(_key(name), [name])
        for key in map(_key, others):
            if script := _ELSEWHERE.get(key):
                return f"{name} is an option of {script}"
        close = difflib.get_close_matches(_key(name), keys, 1) if name.startswith("--") else []
        action = self._option_string_actions.get(before)
        if close:
            return f"unknown option {name}, did you mean {own.get(close[0], f'--{close[0]}')}?"
        if action is not None and action.nargs is None:
            return f'unknown option {name}; as the value of {before} write {before}="{name}"'
        return f"unknown option {name}"

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = list(map(str, action.choices))
            close = difflib.get_close_matches(str(value), choices, 1)
            guess = f" (did you mean {close[0]}?)" if close else ""
            raise argparse.ArgumentError(action, f"{value!r} is unknown{guess}; choose {_one_of(choices)}")

    def _refuse_empty(self, parsed: Any) -> None:
        for action in self._actions:
            value = getattr(parsed, action.dest, None)
            empty = "" in (value if isinstance(value, list) else [value])
            if empty and action.metavar in _FILES and "" not in (action.default, action.const):
                self.error(f"{action.option_strings[0]} is empty; is a variable of the shell not set?")


class _Help(argparse.RawDescriptionHelpFormatter):
    """Shows only meaningful defaults, and the synonyms of an option."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = action.default in (argparse.SUPPRESS, None, "", [], (0, 0, 0, 0)) or action.default is False
        text = action.help if silent else f"{action.help} (default: %(default)s)"
        others = [name for names in SAME if set(names) & set(action.option_strings) for name in names]
        others = [name for name in others if name not in action.option_strings][:_SHOWN]
        return f"{text} [also {', '.join(others)}]" if others else text
