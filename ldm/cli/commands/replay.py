"""`ldm replay`: regenerates images from the metadata in their files.

The content of a file is data: its job is run as it is. Only typed options are parsed.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm import cli
from ldm.cli.app import outcome
from ldm.cli.changes import as_changes
from ldm.cli.parser import Parser
from ldm.runs.model_cache import ModelCache
from ldm.util import InputError, need, printable

if TYPE_CHECKING:
    from ldm.metadata.read import Recipe

_DESCRIPTION = (
    "Regenerates images from what their files record, as they were or with other options.\n\n"
    "An option that sets how an image is made replaces what the file records."
)
_EXAMPLES = (
    "python scripts/replay.py outputs/txt2img-samples/samples/00000.png --verify",
    "python scripts/replay.py image.png --show",
    "python scripts/replay.py image.png --steps 100 --upscale 2",
)


def _run_options() -> Parser:
    """Returns the options of all scripts that make images."""
    options = cli.make_parser(_DESCRIPTION, "FILE [FILE ...] [options]", _EXAMPLES)
    cli.add_prompt_options(options, prompt="")
    cli.add_image_options(options, strength=1.0, required=False)
    cli.add_mask_options(options)
    cli.add_sampling_options(options, scale=7.5)
    cli.add_size_options(options, own="the image's own size")
    cli.add_upscale_options(options)
    cli.add_control_options(options)
    cli.add_batch_options(options, n_iter=1, n_samples=1)
    cli.add_output_options(options, outdir="")
    cli.add_model_options(options)
    return options


def _with_reports(options: argparse.ArgumentParser) -> argparse.ArgumentParser:
    cli.add_telling_options(options)
    cli.add_report_options(options)
    return options


OUTDIR = "outputs/replay"
_OWN = ("files", "outdir", "show", "verify", "tolerance", "json", "dry_run", "quiet", "debug", "typed")
_FOR_RUNS = {
    "from_file": "--from-file",
    **{
        name: f"--{name}"
        for name in (
            "prompt_format", "expand", "sweep", "indir", "n_iter", "n_rows", "resume", "gallery", "skip_grid",
            "skip_save", "keep_going", "images_per_prompt",
        )
    },
}  # fmt: skip


def _add_replay_options(parser: Parser) -> None:
    """Adds the options for files and actions. Options of whole runs, which the parser has already, are hidden."""
    parser.hide(_FOR_RUNS)
    parser.conflict_handler = "resolve"  # an option of this name in a run has another meaning
    parser.add_argument(
        "files", metavar="FILE", nargs="+", help="PNG, JPEG or WebP files that were generated"
    )
    group = parser.add_argument_group("replay")
    what = group.add_mutually_exclusive_group()
    what.add_argument(
        "--show",
        action="store_true",
        help="print how it was made and the command for it; make nothing",
    )
    what.add_argument("--verify", action="store_true", help="compare the new image with the file")
    group.add_argument(
        "--tolerance",
        metavar="N",
        type=int,
        default=0,
        help="let --verify pass differences up to this, 0 to 255",
    )
    group.add_argument(
        "--n_samples",
        metavar="N",
        default=argparse.SUPPRESS,
        help="size of the batch that an image is made in (default: as in its file)",
    )
    group.add_argument("--outdir", metavar="DIR", default=OUTDIR, help="folder for the images")


def _replay(opt: argparse.Namespace, usual: Mapping[str, Any]) -> int:
    """Replays every file in turn; returns 0, or 1 if some failed or differ, 2 if all were refused.

    `opt` holds the typed options, and `usual` the default options of a run.
    """
    typed = {name: value for name, value in vars(opt).items() if name not in _OWN and value is not None}
    for name, option in _FOR_RUNS.items():
        need(name not in typed, f"replay.py does not take {option} (it makes one image at a time)")
    need(opt.show or not (opt.json or opt.dry_run), "--json and --dry_run go with --show")
    need(0 <= opt.tolerance <= 255, f"--tolerance is {opt.tolerance}; give 0 to 255")
    codes: list[int] = []
    cache = ModelCache()
    for file in opt.files:
        codes.append(outcome(partial(_one, Path(file), opt, typed, usual, cache), opt.debug))
        if codes[-1] >= 128:
            return codes[-1]
    return codes[0] if len(set(codes)) == 1 else 1


def _one(
    file: Path, opt: argparse.Namespace, typed: Mapping[str, Any], usual: Mapping[str, Any], cache: ModelCache
) -> int:
    """Replays one file; a fault's line begins with its name."""
    from ldm.cli.explain import show
    from ldm.cli.recreate import recreate
    from ldm.metadata.read import read_job

    shown = printable(file)
    try:
        recipe = _readable(read_job(str(file)))
        if opt.show:
            return show(file, recipe, typed, opt.json)
        return recreate(file, recipe, opt, typed, usual, cache)
    except InputError as error:
        raise InputError(str(error) if str(error).startswith(shown) else f"{shown}: {error}") from error


def _readable(recipe: Recipe) -> Recipe:
    """Returns `recipe` with prompts as plain text where another program parsed notations not supported here."""
    from ldm.runs.checks import check_syntax

    job = recipe.job
    if recipe.source == "ldm" or job.prompt_syntax == "plain":
        return recipe
    try:
        check_syntax(job)
    except InputError as error:
        note = f"its prompts are read as plain text: {error}"
        return replace(recipe, job=replace(job, prompt_syntax="plain"), notes=(*recipe.notes, note))
    return recipe


def parser() -> argparse.ArgumentParser:
    """Returns the options of the command."""
    options = _run_options()
    as_changes(options)
    _add_replay_options(options)
    return _with_reports(options)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command with these arguments, or those of the process; returns its exit code."""
    usual = vars(_with_reports(_run_options()).parse_args([]))
    return cli.main(parser(), partial(_replay, usual=usual), argv)
