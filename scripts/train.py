#!/usr/bin/env python
"""Trains the bundled model in stages: autoencoder, text, latents, diffusion, export; and its judge."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ldm  # noqa: F401  (this toolkit's own, whatever else is installed)

sys.path.pop(0)  # its parts are found through it from here on; the folder itself may be the user's

CONFIGS = {
    "autoencoder": "autoencoder.yaml",
    "text": "text.yaml",
    "latents": "diffusion.yaml",
    "diffusion": "diffusion.yaml",
    "export": "diffusion.yaml",
    "judge": "judge.yaml",
}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=tuple(CONFIGS))
    parser.add_argument("--base", type=Path, help="the stage's config (default: the one in configs/shapes)")
    parser.add_argument("--logdir", type=Path, default=Path("logs/shapes"), help="where results go")
    parser.add_argument("--resume", action="store_true", help="go on from the last state in --logdir")
    parser.add_argument("--max_time", help="stop after this long, as DD:HH:MM:SS")
    parser.add_argument("settings", nargs="*", help="changes to the config, such as training.batch_size=32")
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    from ldm.training.stages import STAGES, Stage, read_config
    from ldm.util import InputError

    base = options.base or Path("configs/shapes") / CONFIGS[options.stage]
    try:
        config = read_config(base, options.settings)
        bar = sys.stderr.isatty()
        STAGES[options.stage](
            Stage(options.stage, config, options.logdir, options.resume, options.max_time, bar)
        )
    except InputError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
