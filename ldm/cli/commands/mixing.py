"""The options of `ldm convert` that add models up, merge LoRAs and extract them."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING

from ldm.cli.model_options import add_lora_option, parse_lora
from ldm.util import need, printable

if TYPE_CHECKING:
    from ldm.checkpoints.formats.read import Checkpoint


def add_mixing_options(options: argparse.ArgumentParser) -> None:
    """Adds the options for several models in one, and for LoRAs."""
    group = options.add_argument_group("several models in one, and LoRAs")
    add_lora_option(group, "merge a LoRA into the weights; can be given several times")
    group.add_argument(
        "--add",
        metavar="FILE[:WEIGHT]",
        type=parse_lora,
        help="a weighted sum with another model: (1 - WEIGHT) IN + WEIGHT FILE",
    )
    group.add_argument(
        "--subtract",
        metavar="FILE",
        help="with --add: IN + WEIGHT (what is added - FILE), which moves what was learned to another model",
    )
    group.add_argument(
        "--block_weights",
        metavar="W,W,...",
        type=_numbers,
        default=(),
        help="with --add: a WEIGHT for what is in no block, then for IN00 to IN11, M00, OUT00 to OUT11",
    )
    group.add_argument(
        "--extract_lora", metavar="BASE", help="write the LoRA that turns the model BASE into IN, of --rank"
    )
    group.add_argument(
        "--resize_lora", action="store_true", help="IN is a LoRA: write one of --rank near to it"
    )
    group.add_argument(
        "--rank", metavar="N", type=int, default=32, help="rank of a LoRA that is written (default: 32)"
    )
    group.add_argument(
        "--conv_rank", metavar="N", type=int, default=0, help="rank for 3x3 convolutions; 0 leaves them out"
    )


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{printable(text)!r} is not numbers between commas") from None


def check_mixing(opt: argparse.Namespace) -> None:
    """Checks that the options go together, before anything is read; else raises `InputError`."""
    need(
        opt.add is not None or not (opt.subtract or opt.block_weights),
        "--subtract and --block_weights belong to --add; give the model to add",
    )
    both = [name for name in ("extract_lora", "resize_lora", "add") if getattr(opt, name)]
    need(
        len(both) < 2,
        f"--{both[0]} and --{both[-1]} write different things; give one of them" if both else "",
    )
    need(opt.rank > 0, f"--rank {opt.rank}: give 1 or more")
    need(opt.conv_rank >= 0, f"--conv_rank {opt.conv_rank}: give 0 or more")


def added(checkpoint: Checkpoint, opt: argparse.Namespace) -> Checkpoint:
    """Returns the checkpoint with another model added, as --add, --subtract and --block_weights state."""
    from ldm.checkpoints.mixing import Addition, mixed
    from ldm.checkpoints.model_files import read_model
    from ldm.files import check_there
    from ldm.places import find

    path, weight, _ = opt.add
    for other, option in ((path, "add"), (opt.subtract, "subtract")):
        if other is not None:
            check_there(find(other), f"give another model with --{option}")
    need(
        weight != 1 or opt.subtract is not None or bool(opt.block_weights),
        f"--add {printable(path)} with the weight 1 is that model itself; give a weight, as in FILE:0.5",
    )
    minus = None if opt.subtract is None else read_model(find(opt.subtract)).state_dict
    addition = Addition(read_model(find(path)).state_dict, minus, weight, opt.block_weights)
    return replace(checkpoint, state_dict=mixed(checkpoint.state_dict, addition))
