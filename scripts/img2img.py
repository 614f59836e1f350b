#!/usr/bin/env python
"""Makes pictures from pictures and text."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from ldm import cli  # this toolkit's own, whatever else is installed

sys.path.pop(0)  # its parts are found through it from here on; the folder itself may be the user's

EXAMPLES = (
    'python scripts/img2img.py --init-img sketch.png --prompt "a blue sphere left of a red cone"',
    'python scripts/img2img.py --init-img photo.jpg --W 512 --H 512 --strength 0.5 --prompt "an oil painting"',
    'python scripts/img2img.py --init-img folder/ --n_samples 1 --prompt "a watercolour" --dry_run',
)


def parser() -> argparse.ArgumentParser:
    options = cli.make_parser(__doc__ or "", "--init-img FILE --prompt TEXT [options]", EXAMPLES)
    cli.add_prompt_options(options, prompt="a painting of a virus monster playing guitar")
    cli.add_image_options(options, strength=0.75, required=True)
    cli.add_sampling_options(options, scale=5.0)
    cli.add_size_options(options, own="the picture's own size")
    cli.add_upscale_options(options)
    cli.add_batch_options(options, n_iter=1, n_samples=2)
    cli.add_output_options(options, outdir="outputs/img2img-samples")
    cli.add_model_options(options)
    cli.add_rank_options(options)
    cli.add_telling_options(options)
    cli.add_report_options(options)
    return options


def main(argv: Sequence[str] | None = None) -> int:
    return cli.main(parser(), cli.run, argv)


if __name__ == "__main__":
    sys.exit(main())
