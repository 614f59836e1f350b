#!/usr/bin/env python
"""Repaints a part of a picture, or extends it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from ldm import cli  # this toolkit's own, whatever else is installed

sys.path.pop(0)  # its parts are found through it from here on; the folder itself may be the user's

EXAMPLES = (
    'python scripts/inpaint.py --init-img scene.png --mask mask.png --prompt "a red sphere"',
    'python scripts/inpaint.py --init-img scene.png --outpaint 0,0,64,0 --prompt "a wide landscape"',
    'python scripts/inpaint.py --indir pairs/ --ckpt sd-v1-5-inpainting.ckpt --prompt "an empty street"',
)


def parser() -> argparse.ArgumentParser:
    options = cli.make_parser(__doc__ or "", "--init-img FILE --mask FILE --prompt TEXT [options]", EXAMPLES)
    cli.add_prompt_options(options, prompt="")
    cli.add_image_options(options, strength=1.0, required=False)
    cli.add_mask_options(options)
    cli.add_sampling_options(options, scale=7.5)
    cli.add_size_options(options, own="the picture's own size")
    cli.add_batch_options(options, n_iter=1, n_samples=1)
    cli.add_output_options(options, outdir="outputs/inpaint-samples")
    cli.add_model_options(options)
    cli.add_rank_options(options)
    cli.add_telling_options(options)
    cli.add_report_options(options)
    return options


def main(argv: Sequence[str] | None = None) -> int:
    return cli.main(parser(), cli.run, argv)


if __name__ == "__main__":
    sys.exit(main())
