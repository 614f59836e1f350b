"""The options for the model: its files, LoRAs and textual inversions, precision and devices."""

from __future__ import annotations

import argparse
import os
import re
from typing import Any

from ldm.checkpoints.configs import BUNDLED_CKPT, BUNDLED_CONFIG, LAION_CKPT, LAION_CONFIG, V1_CKPT, V1_CONFIG

LAION_OUTDIR = "outputs/txt2img-samples-laion400m"


def add_laion_option(parser: argparse.ArgumentParser) -> None:
    """Adds the option for the LAION-400M model of the original."""
    parser.add_argument_group("LAION-400M").add_argument(
        "--laion400m",
        action=_Laion,
        nargs=0,
        default=False,
        help=f"use the LAION-400M model; unless given, --config is {LAION_CONFIG}, --ckpt {LAION_CKPT} and "
        f"--outdir {LAION_OUTDIR}",
    )


class _Laion(argparse.Action):
    """Sets the flag and its folder, unless another folder was given."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        namespace.laion400m = True
        if namespace.outdir == parser.get_default("outdir"):
            namespace.outdir = LAION_OUTDIR


PRECISIONS = ("full", "autocast", "bf16", "fp16", "int8")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of weights, device and precision."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--ckpt",
        metavar="PATH",
        help="checkpoint: a file, or a folder in the layout of diffusers "
        f"(default: {V1_CKPT}, or the bundled model if that is absent)",
    )
    group.add_argument(
        "--ema",
        choices=("auto", "on", "off"),
        default="auto",
        help="use a checkpoint's averaged weights; auto: if it has any",
    )
    group.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="autocast",
        help="full: float32; autocast: fp16 on a GPU, bf16 on a CPU that can; int8: for CPUs, approximate",
    )
    group.add_argument(
        "--no_mmap",
        action="store_true",
        help="read the checkpoint into memory first, for network drives and files that may change; takes more memory",
    )
    group.add_argument(
        "--cache_weights",
        metavar="DIR",
        nargs="?",
        const="",
        help="keep the weights as this CPU multiplies them, for a faster next start (default DIR: the user's cache)",
    )
    group.add_argument(
        "--compile",
        action="store_true",
        help="torch.compile the U-Net: minutes at first, kept for later runs; needs a C++ compiler",
    )
    group.add_argument(
        "--lowmem", action="store_true", help="keep in memory only what is in use: slower, the same images"
    )
    group.add_argument("--device", metavar="NAME", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    add_parts_options(parser)
    _add_addition_options(parser)


def add_measured_model_options(parser: argparse.ArgumentParser) -> Any:
    """Adds the options for the model of the bundled one's kind that is measured; returns their group."""
    group = parser.add_argument_group("model")
    group.add_argument("--config", metavar="FILE", default=BUNDLED_CONFIG, help="model config")
    group.add_argument("--ckpt", metavar="FILE", default=BUNDLED_CKPT, help="the checkpoint that is measured")
    group.add_argument(
        "--judge", metavar="FILE", default="models/ldm/shapes/judge.pt", help="the network that reads images"
    )
    group.add_argument("--device", metavar="NAME", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    return group


def add_rank_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that set how many devices share the work."""
    group = parser.add_argument_group("several devices")
    group.add_argument(
        "--devices",
        metavar="N",
        type=int,
        help="share the run among N processes of this machine, one for each GPU (with torchrun: those it starts)",
    )
    group.add_argument(
        "--num_nodes", metavar="N", type=int, help="share it among N machines with one output folder"
    )


def add_parts_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options for the checkpoint's kind, and for replacements of its parts."""
    group = parser.add_argument_group("parts of the model")
    group.add_argument(
        "--config", metavar="FILE", help=f"model config (default: {V1_CONFIG}, or what fits the checkpoint)"
    )
    group.add_argument(
        "--allow_targets",
        metavar="PACKAGE",
        action="append",
        default=[],
        help="let the config use classes of this package, which runs its code",
    )
    group.add_argument(
        "--prediction",
        choices=("auto", "eps", "v"),
        default="auto",
        help="what the U-Net predicts, the noise or v; auto: as the checkpoint states",
    )
    group.add_argument(
        "--vae", metavar="PATH", help="the autoencoder of this file or diffusers folder instead"
    )
    group.add_argument(
        "--text_encoder", metavar="PATH", help="the text encoder of this file or diffusers folder instead"
    )
    group.add_argument(
        "--upscaler",
        metavar="FILE",
        help="enlarge images by this network of the ESRGAN family (needs spandrel): before the second pass of "
        "--upscale, or without one the finished images",
    )


def _add_addition_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of LoRAs and textual inversions."""
    group = parser.add_argument_group("LoRA and textual inversion")
    add_lora_option(
        group,
        "put a LoRA onto the model with WEIGHT (1), and onto its text encoder with TEXT (the same); "
        "can be given several times",
    )
    group.add_argument(
        "--lora_dir",
        metavar="DIR",
        help="find what <lora:NAME:WEIGHT> in a prompt names below this folder",
    )
    group.add_argument(
        "--embedding",
        metavar="FILE[=NAME]",
        type=_embedding,
        action="append",
        default=[],
        help="let NAME in a prompt (default: the file's name) mean a textual inversion; "
        "can be given several times",
    )
    group.add_argument("--embedding_dir", metavar="DIR", help="use every textual inversion below this folder")


def add_lora_option(group: Any, help: str) -> None:
    """Adds the option that names LoRAs with their weights."""
    group.add_argument(
        "--lora", metavar="FILE[:WEIGHT[:TEXT]]", type=parse_lora, action="append", default=[], help=help
    )


def parse_lora(text: str) -> tuple[str, float, float]:
    """Parses a file with its weights on U-Net and text encoder; only numbers are split off, from the right."""
    if not text:
        raise argparse.ArgumentTypeError("the name is empty; is a variable of the shell not set?")
    path = text
    weights: list[float] = []
    while len(weights) < 2 and not os.path.exists(path):
        head, _, number = path.rpartition(":")
        if not head or not re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", number):
            break
        path, weights = head, [float(number), *weights]
    weight, on_text = (weights or [1.0])[0], (weights or [1.0])[-1]
    return path, weight, on_text


def _embedding(text: str) -> tuple[str, str | None]:
    """Parses a file and its name; an existing file whose name contains `=` is kept whole."""
    path, sign, name = text.rpartition("=")
    return (path, name) if sign and path and not os.path.exists(text) else (text, None)
