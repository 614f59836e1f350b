"""`ldm train KIND`: trains a model on the user's own images."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_type_hints

from ldm import cli
from ldm.cli.model_options import add_parts_options
from ldm.finetuning.settings import Settings, make_settings, rows
from ldm.util import InputError

_ABOUT = {
    "lora": "a LoRA: a small file that changes the model",
    "embedding": "an embedding: a word of your own (textual inversion)",
    "dreambooth": "all weights of the U-Net on a few images of one thing",
    "finetune": "all weights of the U-Net, and with --text_rate of the text encoder",
    "inpainting": "an inpainting model, from one for text",
    "controlnet": "a ControlNet: a network that draws by a hint, such as edges",
}
_EXAMPLES = {
    "lora": (
        "--data photos --out ink.safetensors",
        "--data photos --out ink.safetensors --rank 16 --text_rate 5e-5",
    ),
    "embedding": (
        "--data photos --word my-style --init style --caption 'a photo of my-style' --out my-style.safetensors",
    ),
    "dreambooth": (
        "--data photos --caption 'a photo of sks dog' --class_data dogs --class_caption 'a dog' --out dog.ckpt",
    ),
    "finetune": ("--data photos --out mine.safetensors --ema_decay 0.999",),
    "inpainting": ("--data photos --out mine-inpainting.ckpt",),
    "controlnet": (
        "--data photos --hint canny --out edges.safetensors",
        "--data photos --hints sketches --out sketches.safetensors --ema_decay 0.999",
    ),
}


def parser(kind: str) -> argparse.ArgumentParser:
    """Returns the options of a kind of training; a setting that is not given is not in the result."""
    examples = tuple(f"python scripts/train.py {kind} {example}" for example in _EXAMPLES[kind])
    usage = f"{kind} --data DIR --out FILE [SETTING=VALUE ...] [options]"
    options = cli.make_parser(f"Trains {_ABOUT[kind]}, on your own images.", usage, examples)
    options.add_argument("kind", choices=(kind,), help=argparse.SUPPRESS)
    options.add_argument("settings", metavar="SETTING=VALUE", nargs="*", help="a setting, as in a config")
    group = options.add_argument_group("files")
    group.add_argument(
        "--data",
        metavar="DIR",
        help="a folder of images with captions in NAME.txt, a TOML file, or tar files (WebDataset)",
    )
    group.add_argument("--out", metavar="FILE", help="the file to write")
    group.add_argument("--ckpt", metavar="PATH", help="the model to begin with (default: as in txt2img)")
    group.add_argument("--base", metavar="FILE", help="a YAML file of settings")
    group.add_argument("--resume", action="store_true", help="go on from the last state of this --out")
    group.add_argument("--max_time", metavar="DD:HH:MM:SS", help="stop after this long and keep the state")
    group.add_argument("--device", metavar="NAME", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    group.add_argument(
        "--dry_run", action="store_true", help="read the images, report what would be trained, and stop"
    )
    hints = get_type_hints(Settings)
    groups: dict[str, Any] = {}
    for row, default in rows(kind):
        about = row.metadata
        place = groups.setdefault(about["group"], options.add_argument_group(about["group"]))
        add_setting(place, row.name, hints[row.name], about, default)
    add_parts_options(options)
    cli.add_report_options(options)
    return options


def add_setting(place: Any, name: str, hint: Any, about: Any, default: Any) -> None:
    """Adds one setting as an option; its default is in the help only."""
    kinds = (hint, *getattr(hint, "__args__", ()))
    named: dict[str, Any] = {"default": argparse.SUPPRESS, "dest": f"setting_{name}"}
    if bool in kinds:
        shown = f"{about['help']} (default: {'on' if default else 'off'})" if default else about["help"]
        place.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, help=shown, **named)
        return
    shown = about["help"] if default in (None, "", ()) else f"{about['help']} (default: {default})"
    if about["choices"]:
        place.add_argument(f"--{name}", choices=about["choices"], help=shown, **named)
        return
    numbers = next((kind for kind in (int, float) if kind in kinds), str)
    many = {"action": "append"} if default == () else {}
    metavar = about["metavar"] or ("N" if numbers is int else "X" if numbers is float else "TEXT")
    place.add_argument(f"--{name}", type=numbers, metavar=metavar, help=shown, **many, **named)


def settings_of(kind: str, opt: argparse.Namespace) -> Settings:
    """Returns the settings: the kind's defaults, then the config's, the options', and the changes' values."""
    given = {
        name.removeprefix("setting_"): value
        for name, value in vars(opt).items()
        if name.startswith("setting_")
    }
    if opt.base or opt.settings:
        from ldm.finetuning.config import read_settings

        given = {**read_settings(opt.base), **given, **read_settings(None, opt.settings)}
    return make_settings(kind, given)


def run(kind: str, opt: argparse.Namespace) -> int:
    for name, what in (("data", "a folder of images"), ("out", "the file to write")):
        if getattr(opt, name) is None:
            raise InputError(f"--{name} is missing; give {what}")
    settings = settings_of(kind, opt)
    if kind == "embedding" and (not settings.word or not settings.init.strip()):
        raise InputError(
            "an embedding needs --word, the word to learn, and --init, words that are near to it"
        )
    from ldm.finetuning.run import Training

    out = Path(opt.out)
    bar = sys.stderr.isatty() and not opt.quiet
    training = Training(kind, Path(opt.data), out, settings, opt.resume, opt.max_time, bar)
    training.check()
    examples = training.examples()
    from ldm.runs.models import choose_model
    from ldm.runs.options import RunOptions

    parts = {"vae": opt.vae, "text_encoder": opt.text_encoder, "config": opt.config}
    config_path, ckpt = choose_model(
        RunOptions(outdir="", ckpt=opt.ckpt, allow_targets=tuple(opt.allow_targets), **parts)
    )
    from ldm.finetuning.load import Base
    from ldm.finetuning.run import run_training
    from ldm.runtime.device import resolve_device, resolve_precision

    device = resolve_device(opt.device)
    names = {"auto": "bf16" if device.type != "cpu" else "autocast"}
    precision = resolve_precision(names.get(settings.precision, settings.precision), device)
    base = Base(
        config_path,
        ckpt,
        opt.vae,
        opt.text_encoder,
        opt.prediction,
        tuple(opt.allow_targets),
        kind == "inpainting",
    )
    return run_training(training, examples, base.load, base.notes(), device, precision.dtype, opt.dry_run)


def main(kind: str, argv: Sequence[str] | None = None) -> int:
    """Runs the training of a kind with these arguments, or those of the process; returns its exit code."""
    return cli.main(parser(kind), lambda opt: run(kind, opt), argv)
