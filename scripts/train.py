#!/usr/bin/env python
"""Trains the bundled model in stages: autoencoder, text, latents, diffusion, export."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=("autoencoder", "text", "latents", "diffusion", "export"))
    parser.add_argument("--base", type=Path, help="the stage's config (default: configs/shapes/STAGE.yaml)")
    parser.add_argument("--logdir", type=Path, default=Path("logs/shapes"), help="where states and weights go")
    parser.add_argument("--resume", action="store_true", help="go on from the last state in --logdir")
    parser.add_argument("--max_time", help="stop after this long, as DD:HH:MM:SS")
    parser.add_argument("settings", nargs="*", help="changes to the config, such as training.batch_size=32")
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    from ldm.training import stages
    from ldm.util import InputError

    base = options.base or Path("configs/shapes") / f"{options.stage}.yaml"
    try:
        stages.run(
            options.stage,
            stages.read_config(base, options.settings),
            options.logdir,
            resume=options.resume,
            max_time=options.max_time,
            bar=sys.stderr.isatty(),
        )
    except InputError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
