"""`ldm convert`: converts a model between layouts and precisions."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence

from ldm import cli
from ldm.cli.model_options import add_parts_options

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}

_DESCRIPTION = "Converts a model between layouts and precisions; nothing is ever overwritten."
_EXAMPLES = (
    "python scripts/convert.py sd-v1-4.ckpt sd-v1-4.safetensors --dtype fp16",
    "python scripts/convert.py sd-v1-4.ckpt sd-v1-4-diffusers",
    "python scripts/convert.py stable-diffusion-v1-5/ v1-5.ckpt",
)


def parser() -> argparse.ArgumentParser:
    """Returns the options of the command."""
    options = cli.make_parser(_DESCRIPTION, "IN OUT [options]", _EXAMPLES)
    options.add_argument(
        "ckpt", metavar="IN", help="a checkpoint of any layout: a file, or a diffusers folder"
    )
    options.add_argument("out", metavar="OUT", help="what to write: NAME.safetensors, NAME.ckpt, or a folder")
    group = options.add_argument_group("conversion")
    group.add_argument(
        "--to",
        choices=("compvis", "diffusers", "ckpt"),
        help="one safetensors file in the original's layout, a diffusers folder, or a file as torch saves it "
        "(default: by the ending of OUT)",
    )
    group.add_argument(
        "--dtype", choices=("keep", *DTYPES), default="keep", help="the type of the weights that are written"
    )
    group.add_argument(
        "--ema",
        choices=("auto", "on", "off", "both"),
        default="auto",
        help="which of two sets of weights is written; auto: the averaged ones if there are any",
    )
    add_parts_options(options)
    cli.add_report_options(options)
    return options


def run(opt: argparse.Namespace) -> int:
    from ldm.checkpoints.convert import check_output, convert, layout_for
    from ldm.files import check_there
    from ldm.places import find
    from ldm.runs.models import choose_model
    from ldm.runs.options import RunOptions
    from ldm.util import printable

    check_there(find(opt.ckpt), "give another model as IN")
    to = opt.to or layout_for(opt.out)
    check_output(opt.out, to, opt.ema)
    config_path, ckpt = choose_model(
        RunOptions(
            outdir="",
            ckpt=opt.ckpt,
            config=opt.config,
            allow_targets=tuple(opt.allow_targets),
            vae=opt.vae,
            text_encoder=opt.text_encoder,
        )
    )

    import torch

    from ldm.checkpoints.model_files import read_model
    from ldm.config import read_config

    dtype = getattr(torch, DTYPES[opt.dtype]) if opt.dtype in DTYPES else None
    checkpoint = read_model(ckpt, vae=opt.vae, text_encoder=opt.text_encoder, prediction=opt.prediction)
    convert(checkpoint, read_config(config_path, opt.allow_targets), opt.out, to, dtype, opt.ema)
    logging.getLogger("ldm").info("written: %s", printable(opt.out))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command with these arguments, or those of the process; returns its exit code."""
    return cli.main(parser(), run, argv)
