"""`ldm evaluate`: measures how well the bundled model follows captions."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from ldm import cli
from ldm.cli.model_options import PRECISIONS, add_measured_model_options
from ldm.fields import SETTINGS
from ldm.files import check_there
from ldm.places import find
from ldm.prompts.lines import MAX_COUNT
from ldm.util import InputError, need, printable

# the tasks of the command, each in its module; without one the bundled model is measured
TASKS = {
    "run": "evaluate_run",
    "score": "evaluate_score",
    "plot": "evaluate_plot",
    "compare": "evaluate_compare",
    "solvers": "evaluate_solvers",
    "lesson": "evaluate_lesson",
    "control": "evaluate_control",
}
_DESCRIPTION = (
    "Measures the bundled model: generates captioned scenes, which a separate network reads.\n\n"
    f"Other tasks: {', '.join(TASKS)}; evaluate.py run --help lists the options of one."
)
_EXAMPLES = (
    "python scripts/evaluate.py --count 40",
    "python scripts/evaluate.py --sampler dpm_solver --steps 10 --sheet sheet.png",
    "python scripts/evaluate.py --ckpt logs/mine/model.ckpt --seed 1000",
)


def parser() -> argparse.ArgumentParser:
    """Returns the options of the command."""
    options = cli.make_parser(_DESCRIPTION, "[options]", _EXAMPLES)
    group = add_measured_model_options(options)
    group.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="autocast",
        help="as for txt2img.py",
    )
    group = options.add_argument_group("sampling")
    group.add_argument("--sampler", choices=SETTINGS["sampler"].choices, default="plms", help="the sampler")
    group.add_argument("--steps", metavar="N", type=int, default=50, help="denoising steps, 1 to 999")
    group.add_argument(
        "--scale", metavar="X", type=float, default=7.5, help="guidance scale; 1 turns guidance off"
    )
    group.add_argument(
        "--seed", metavar="N", type=int, default=0, help="seed of the first image and its caption"
    )
    group.add_argument("--size", metavar="N", type=int, default=128, help="width and height in pixels")
    group = options.add_argument_group("images")
    group.add_argument(
        "--count", metavar="N", type=int, default=400, help="images, half of them of held-out pairs"
    )
    group.add_argument("--batch", metavar="N", type=int, default=20, help="images at a time")
    group.add_argument("--plain", action="store_true", help="canonical captions instead of free wordings")
    group.add_argument("--sheet", metavar="FILE", help="write all images into this one")
    cli.add_report_options(options)
    return options


def check(opt: argparse.Namespace) -> None:
    """Checks that numbers are in range and files can be read or written, else raises `InputError`."""
    for name, field in (("steps", "steps"), ("scale", "scale"), ("seed", "seed"), ("size", "width")):
        try:
            SETTINGS[field].check(getattr(opt, name))
        except ValueError as error:
            raise InputError(f"--{name} {error}") from None
    need(
        2 <= opt.count <= MAX_COUNT,
        f"--count is {opt.count}; give 2 to {MAX_COUNT}, half for each kind of pair",
    )
    need(1 <= opt.batch <= MAX_COUNT, f"--batch is {opt.batch}; give 1 to {MAX_COUNT}")
    for name in ("config", "ckpt", "judge"):
        check_there(find(getattr(opt, name)), f"give another with --{name}")
    if opt.sheet is not None:
        from PIL import Image

        sheet = Path(opt.sheet)
        known = Image.registered_extensions()
        need(
            known.get(sheet.suffix.lower()) in Image.SAVE, f"--sheet {printable(sheet)}: end its name in .png"
        )
        check_there(sheet.absolute().parent, "give --sheet in a folder that exists")
        need(
            os.access(sheet.absolute().parent, os.W_OK),
            f"--sheet {printable(sheet)}: its folder is read-only",
        )


def run(opt: argparse.Namespace) -> int:
    """Generates and classifies the images, and prints the fractions that are correct."""
    check(opt)
    from ldm.training.evaluate import Measurement, evaluate, save_sheet

    fields = {name: getattr(opt, name) for name in Measurement.__dataclass_fields__}
    images, shares = evaluate(Measurement(**fields))
    for split, (count, right) in shares.items():
        print(f"{split:8s} n={count}  " + "  ".join(f"{k} {v:.1%}" for k, v in right.items()))
    if opt.sheet is not None:
        save_sheet(images, Path(opt.sheet))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command with these arguments, or those of the process; returns its exit code.

    A first argument of `TASKS` selects that task.
    """
    typed = sys.argv[1:] if argv is None else argv
    if not typed or typed[0] not in TASKS:
        return cli.main(parser(), run, argv)
    task = import_module(f"{__package__}.{TASKS[typed[0]]}")
    end = typed.index("--") if "--" in typed else len(typed)
    options, own = task.parser(), typed[1:end]
    options.set_defaults(passed=list(typed[end + 1 :]))  # of txt2img.py
    if argv is None:
        sys.argv = [sys.argv[0], *own]
    return cli.main(options, task.run, None if argv is None else own)
