"""The command `ldm`: one subcommand for each task, each in its module.

The files in `scripts` run the same subcommands from a checkout.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple

from ldm import cli


class Command(NamedTuple):
    """A subcommand: the module in this package and its function that runs it, and a summary."""

    module: str
    function: str
    summary: str


COMMANDS = {
    "txt2img": Command("generate", "txt2img", "generate images from text"),
    "img2img": Command("generate", "img2img", "generate images from images and text"),
    "inpaint": Command("generate", "inpaint", "repaint a part of an image, or extend it"),
    "replay": Command("replay", "main", "regenerate images from what their files record"),
    "convert": Command("convert", "main", "convert a model between layouts and precisions"),
    "inspect": Command("inspect", "main", "report the kind, parts, precision and damage of model files"),
    "benchmark": Command("benchmark", "main", "time every phase of generating images"),
    "evaluate": Command("evaluate", "main", "measure images and models: FID, text-image scores, differences"),
    "train": Command("train", "main", "train on your own images, or the bundled model"),
    "where": Command("where", "main", "list where files are looked for, and what was found"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the subcommand that the first argument names, with the rest; returns its exit code.

    Without `argv` the command line of the process is used; only then a subcommand may restart the process.
    """
    typed = sys.argv[1:] if argv is None else argv
    if not typed or typed[0] not in COMMANDS:
        return cli.main(parser(), lambda _: 0, typed[:1] or ["--help"])  # prints help, the version or a fault
    command = COMMANDS[typed[0]]
    if argv is None:
        sys.argv = [f"ldm {typed[0]}", *typed[1:]]  # the name that the subcommand shows, and its arguments
    try:
        run = getattr(import_module(f"{__name__}.{command.module}"), command.function)
    except KeyboardInterrupt:  # before any work has begun
        return 130
    return run(None if argv is None else typed[1:])


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the first argument; its help lists the subcommands."""
    width = max(map(len, COMMANDS))
    listed = "\n".join(f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items())
    description = f"A toolkit for Stable Diffusion v1.\n\ncommands:\n{listed}"
    options = cli.make_parser(description, "COMMAND [options]", ("ldm txt2img --help",))
    options.prog = "ldm"
    options.add_argument("command", metavar="COMMAND", choices=tuple(COMMANDS), help=argparse.SUPPRESS)
    cli.add_version_option(options)
    return options
