"""`ldm replay`: regenerates images from the metadata in their files."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial

from ldm import cli
from ldm.cli.changes import as_changes
from ldm.cli.replay import add_replay_options, replay

_DESCRIPTION = (
    "Regenerates images from what their files record, as they were or with other options.\n\n"
    "An option that sets how an image is made replaces what the file records."
)
_EXAMPLES = (
    "python scripts/replay.py outputs/txt2img-samples/samples/00000.png --verify",
    "python scripts/replay.py picture.png --show",
    "python scripts/replay.py picture.png --steps 100 --upscale 2",
)


def _run_options() -> argparse.ArgumentParser:
    """Returns the options of all scripts that make images."""
    options = cli.make_parser(_DESCRIPTION, "FILE [FILE ...] [options]", _EXAMPLES)
    cli.add_prompt_options(options, prompt="")
    cli.add_image_options(options, strength=1.0, required=False)
    cli.add_mask_options(options)
    cli.add_sampling_options(options, scale=7.5)
    cli.add_size_options(options, own="the image's own size")
    cli.add_upscale_options(options)
    cli.add_batch_options(options, n_iter=1, n_samples=1)
    cli.add_output_options(options, outdir="")
    cli.add_model_options(options)
    return options


def _with_reports(options: argparse.ArgumentParser) -> argparse.ArgumentParser:
    cli.add_telling_options(options)
    cli.add_report_options(options)
    return options


def parser() -> argparse.ArgumentParser:
    """Returns the options of the command."""
    options = _run_options()
    as_changes(options)
    add_replay_options(options)
    return _with_reports(options)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command with these arguments, or those of the process; returns its exit code."""
    usual = vars(_with_reports(_run_options()).parse_args([]))
    return cli.main(parser(), partial(replay, usual=usual), argv)
