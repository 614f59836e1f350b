"""`ldm evaluate control`: whether solids stand where a ControlNet's hints have them."""

from __future__ import annotations

import argparse
from pathlib import Path

from ldm import cli
from ldm.checkpoints.configs import BUNDLED_CONTROL
from ldm.cli.commands.evaluate_lesson import QUICK_OPTIONS
from ldm.cli.commands.evaluate_run import maker
from ldm.files import check_there
from ldm.places import find
from ldm.prompts.lines import MAX_COUNT
from ldm.util import need, printable

_DESCRIPTION = (
    "Measures a ControlNet of the bundled model: draws captioned scenes without it and with the edges of a rendered "
    "scene, whose solids stand anywhere, and compares where they stand. With --images it writes images to train "
    "such a network on.\n\n"
    "Options after -- are txt2img.py's. The same command continues what was interrupted."
)
_EXAMPLES = (
    "python scripts/evaluate.py control",
    "python scripts/evaluate.py control --images anywhere --count 6000",
    "python scripts/evaluate.py control --control mine.safetensors --outdir outputs/mine -- --scale 3",
)


def parser() -> argparse.ArgumentParser:
    """Returns the options of the command."""
    options = cli.make_parser(_DESCRIPTION, "control [options] [-- TXT2IMG OPTIONS]", _EXAMPLES)
    group = options.add_argument_group("what is measured")
    group.add_argument("--control", metavar="FILE", default=BUNDLED_CONTROL, help="the ControlNet, of edges")
    group.add_argument("--count", metavar="N", type=int, default=200, help="prompts, or images to train on")
    group = options.add_argument_group("output")
    group.add_argument(
        "--images", metavar="DIR", type=Path, help="write images to train on, with captions, and stop"
    )
    group.add_argument(
        "--outdir", metavar="DIR", type=Path, default=Path("outputs/control"), help="folder of what is drawn"
    )
    cli.add_report_options(options)
    return options


def run(opt: argparse.Namespace) -> int:
    """Writes the images, or measures and prints the table."""
    need(2 <= opt.count <= MAX_COUNT, f"--count is {opt.count}; give 2 to {MAX_COUNT}")
    if opt.images is not None:
        need(not opt.images.exists(), f"--images {printable(opt.images)} exists; give a new folder")
        from ldm.data.layout import write_anywhere

        write_anywhere(opt.images, opt.count)
        return 0
    control = find(opt.control)
    check_there(control, "give another with --control")
    from ldm.evaluation.control import as_markdown, measure, write_examples

    own = [*QUICK_OPTIONS, *(["--quiet"] if opt.quiet else []), *opt.passed]
    found = measure(opt.outdir, opt.count, control.absolute(), own, maker([])[1])
    if isinstance(found, int):
        return found
    print(as_markdown(found))
    print(f"\n{printable(write_examples(opt.outdir))}")
    return 0
