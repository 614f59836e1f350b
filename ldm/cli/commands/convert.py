"""`ldm convert`: converts a model between layouts and precisions."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ldm import cli
from ldm.cli.commands.mixing import add_mixing_options, added, check_mixing
from ldm.cli.model_options import add_parts_options
from ldm.places import find
from ldm.util import need, printable

if TYPE_CHECKING:
    from ldm.checkpoints.convert import Layout

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "int8": "float16"}

_DESCRIPTION = "Converts a model between layouts and precisions; nothing is ever overwritten."
_EXAMPLES = (
    "python scripts/convert.py sd-v1-4.ckpt sd-v1-4.safetensors --dtype fp16",
    "python scripts/convert.py sd-v1-4.ckpt inked.safetensors --lora ink.safetensors:0.8",
    "python scripts/convert.py tuned.ckpt tuned-lora.safetensors --extract_lora sd-v1-4.ckpt --rank 32",
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
        "--dtype",
        choices=("keep", *DTYPES),
        default="keep",
        help="the type of the weights that are written; int8: those that --precision int8 rounds, the "
        "others in fp16",
    )
    group.add_argument(
        "--ema",
        choices=("auto", "on", "off", "both"),
        default="auto",
        help="which of two sets of weights is written; auto: the averaged ones if there are any",
    )
    add_mixing_options(options)
    add_parts_options(options)
    cli.add_report_options(options)
    return options


def run(opt: argparse.Namespace) -> int:
    from ldm.checkpoints.convert import check_output, convert, layout_for
    from ldm.files import check_there
    from ldm.runs.models import choose_model
    from ldm.runs.options import RunOptions

    check_there(find(opt.ckpt), "give another model as IN")
    check_mixing(opt)
    if opt.extract_lora or opt.resize_lora:
        from ldm.cli.commands.convert_lora import write_computed_lora

        write_computed_lora(opt)
        return _written(opt.out)
    to = opt.to or layout_for(opt.out)
    check_output(opt.out, to, opt.ema)
    need(opt.dtype != "int8" or to == "compvis", "--dtype int8 writes a safetensors file; name OUT so")
    need(
        opt.dtype != "int8" or opt.ema != "both", "--dtype int8 writes one set of weights; use another --ema"
    )
    if _converted_control(opt, to):
        return _written(opt.out)
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
    from ldm.runtime.prepare import rounded_keys

    dtype = getattr(torch, DTYPES[opt.dtype]) if opt.dtype in DTYPES else None
    checkpoint = read_model(ckpt, vae=opt.vae, text_encoder=opt.text_encoder, prediction=opt.prediction)
    if opt.add is not None:
        checkpoint = added(checkpoint, opt)
    loras = [(str(find(path)), weight, on_text) for path, weight, on_text in opt.lora]
    rounded = rounded_keys if opt.dtype == "int8" else None
    convert(
        checkpoint, read_config(config_path, opt.allow_targets), opt.out, to, dtype, opt.ema, loras, rounded
    )
    return _written(opt.out)


def _converted_control(opt: argparse.Namespace, to: Layout) -> bool:
    """Converts a ControlNet; returns False for any other file."""
    import torch

    from ldm.checkpoints.adapters.control import config_for_control, read_control
    from ldm.checkpoints.convert_control import convert_control
    from ldm.checkpoints.load import build_model
    from ldm.checkpoints.model_files import read_model
    from ldm.config import read_config

    path = find(opt.ckpt)
    if path.is_dir() and not (path / "config.json").is_file():  # a whole model
        return False
    checkpoint = read_model(path)
    if checkpoint.kind.part != "ControlNet":
        return False
    need(opt.dtype != "int8", "--dtype int8 is for models; give a ControlNet another type")
    config = opt.config or find(config_for_control(checkpoint.state_dict))
    file, model = read_control(path), build_model(read_config(config, opt.allow_targets))
    dtype = getattr(torch, DTYPES[opt.dtype]) if opt.dtype in DTYPES else None
    convert_control(file, model.model.diffusion_model, opt.out, to, dtype)
    return True


def _written(out: str) -> int:
    logging.getLogger("ldm").info("written: %s", printable(out))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command with these arguments, or those of the process; returns its exit code."""
    return cli.main(parser(), run, argv)
