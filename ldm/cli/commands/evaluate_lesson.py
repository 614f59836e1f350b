"""`ldm evaluate lesson`: what fine-tuning taught the bundled model, and what it forgot."""

from __future__ import annotations

import argparse
from pathlib import Path

from ldm import cli
from ldm.cli.commands.evaluate_run import maker
from ldm.prompts.lines import MAX_COUNT
from ldm.util import InputError, need, printable

_DESCRIPTION = (
    "Tries out fine-tuning on something that the bundled model does not know: with --images it writes a set of "
    "images to train on, else it draws the same prompts before and after the training and counts what is right.\n\n"
    "Options after -- are txt2img.py's, with which the trained file is used.\n"
    "Lessons: orange, a colour; pyramid, a shape; totem, a word for a pair; hole, for inpainting models."
)
_EXAMPLES = (
    "python scripts/evaluate.py lesson orange --images orange",
    "python scripts/evaluate.py lesson orange --outdir outputs/orange -- --lora orange.safetensors",
)
QUICK_OPTIONS = ("--W", "128", "--H", "128", "--sampler", "ddim", "--schedule", "karras", "--steps", "10",
            "--n_samples", "20")  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """Returns the options of the command."""
    usage = "lesson NAME --images DIR | --outdir DIR [options] -- TXT2IMG OPTIONS"
    options = cli.make_parser(_DESCRIPTION, usage, _EXAMPLES)
    options.add_argument("lesson", metavar="NAME", help="what is learnt")
    group = options.add_argument_group("images to train on")
    group.add_argument("--images", metavar="DIR", type=Path, help="write them, with captions, and stop")
    group.add_argument(
        "--count", metavar="N", type=int, help="images of the new thing (20), or prompts (100)"
    )
    group.add_argument(
        "--usual", metavar="N", type=int, default=200, help="images of what the model knows (default: 200)"
    )
    group = options.add_argument_group("output")
    group.add_argument(
        "--outdir", metavar="DIR", type=Path, default=Path("outputs/lesson"), help="folder of what is drawn"
    )
    cli.add_report_options(options)
    return options


def run(opt: argparse.Namespace) -> int:
    """Writes the images, or measures and prints the table."""
    need(1 <= opt.usual <= MAX_COUNT, f"--usual is {opt.usual}; give 1 to {MAX_COUNT}")
    need(opt.count is None or 1 <= opt.count <= MAX_COUNT, f"--count is {opt.count}; give 1 to {MAX_COUNT}")
    from ldm.data.lessons import HOLE, LESSONS, write_lesson

    names = (*LESSONS, HOLE)
    need(opt.lesson in names, f"{printable(opt.lesson)} is not a lesson; choose from {', '.join(names)}")
    if opt.images is not None:
        need(not opt.images.exists(), f"--images {printable(opt.images)} exists; give a new folder")
        write_lesson(opt.lesson, opt.images, opt.count or 20, opt.usual)
        return 0
    if not opt.passed:
        raise InputError(
            "what was trained is missing; write it after --, such as -- --lora orange.safetensors"
        )
    from ldm.evaluation.lessons import as_markdown, measure, write_pairs

    own = [*QUICK_OPTIONS, *(["--quiet"] if opt.quiet else [])]
    found = measure(opt.lesson, opt.outdir, opt.count or 100, own, opt.passed, maker([])[1])
    if isinstance(found, int):
        return found
    print(as_markdown(found))
    print(f"\n{printable(write_pairs(opt.outdir))}")
    return 0
