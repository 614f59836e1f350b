"""`ldm train`: trains on the user's images (`finetune.py`), or the bundled model in stages."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ldm import cli
from ldm.finetuning.settings import DEFAULTS

CONFIGS = {
    "autoencoder": "autoencoder.yaml",
    "text": "text.yaml",
    "latents": "diffusion.yaml",
    "diffusion": "diffusion.yaml",
    "export": "diffusion.yaml",
    "distil": "distil.yaml",
    "judge": "judge.yaml",
    "taesd": "taesd.yaml",
}
_DESCRIPTION = (
    "Trains the bundled model in stages: autoencoder, text, latents, diffusion, export; its judge, a small "
    "autoencoder, and by distil a LoRA that makes it draw in few steps.\n"
    f"For training on your own images see: train KIND --help, where KIND is {', '.join(DEFAULTS)}."
)
_EXAMPLES = (
    "python scripts/train.py autoencoder",
    "python scripts/train.py diffusion training.batch_size=16 --max_time 00:02:00:00",
    "python scripts/train.py text --resume --logdir logs/mine",
)


def parser(prefixed: bool = False) -> argparse.ArgumentParser:
    """Returns the options for a stage of the bundled model; `prefixed` ones come after the word `shapes`."""
    options = cli.make_parser(_DESCRIPTION, "[shapes] STAGE [SETTING=VALUE ...] [options]", _EXAMPLES)
    if prefixed:
        options.add_argument("shapes", choices=("shapes",), help=argparse.SUPPRESS)
    options.add_argument("stage", choices=tuple(CONFIGS), help="what is trained or written")
    options.add_argument(
        "settings", metavar="SETTING=VALUE", nargs="*", help="a change to the stage's config"
    )
    group = options.add_argument_group("training")
    group.add_argument(
        "--base", metavar="FILE", help="the stage's config (default: its one in configs/shapes)"
    )
    group.add_argument(
        "--logdir", metavar="DIR", type=Path, default=Path("logs/shapes"), help="where results go"
    )
    group.add_argument("--resume", action="store_true", help="continue from the last state in --logdir")
    group.add_argument("--max_time", metavar="DD:HH:MM:SS", help="stop after this long and save the state")
    cli.add_report_options(options)
    return options


def run(opt: argparse.Namespace) -> int:
    from ldm.training.config import read_config
    from ldm.training.stage import Stage
    from ldm.training.stages import STAGES

    config = read_config(Path(opt.base or f"configs/shapes/{CONFIGS[opt.stage]}"), opt.settings)
    bar = sys.stderr.isatty() and not opt.quiet
    stage = Stage(opt.stage, config, opt.logdir, opt.resume, opt.max_time, bar)
    stage.check()
    STAGES[opt.stage](stage)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command with these arguments, or those of the process; returns its exit code.

    The first argument may be a kind of training, or `shapes`, after which a stage of the bundled model follows.
    """
    first = (sys.argv[1:] if argv is None else argv)[:1]
    if first and first[0] in DEFAULTS:
        from ldm.cli.commands.finetune import main as finetune

        return finetune(first[0], argv)
    if first and not first[0].startswith("-") and first[0] not in (*CONFIGS, "shapes"):
        names = cli.make_parser(_DESCRIPTION, "KIND | STAGE ...", _EXAMPLES)
        names.add_argument("kind", choices=(*DEFAULTS, *CONFIGS))
        return cli.main(names, run, first)  # the options that follow depend on it
    return cli.main(parser(first == ["shapes"]), run, argv)
