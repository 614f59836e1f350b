#!/usr/bin/env python
"""Makes pictures from text."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from ldm import cli  # this toolkit's own, whatever else is installed

sys.path.pop(0)  # its parts are found through it from here on; the folder itself may be the user's

EXAMPLES = (
    'python scripts/txt2img.py --prompt "a red cube on top of a blue sphere" --plms',
    'python scripts/txt2img.py --ckpt sd-v1-4.ckpt --prompt "an astronaut riding a horse" --steps 25 --seed 7',
    "python scripts/txt2img.py --from-file prompts.txt --n_samples 4 --outdir outputs/tonight --resume",
)


def parser() -> argparse.ArgumentParser:
    options = cli.make_parser(__doc__ or "", "--prompt TEXT [options]", EXAMPLES)
    cli.add_prompt_options(options, prompt="a painting of a virus monster playing guitar")
    cli.add_sampling_options(options, scale=7.5)
    cli.add_size_options(options)
    cli.add_upscale_options(options)
    cli.add_batch_options(options, n_iter=2, n_samples=3)
    cli.add_output_options(options, outdir="outputs/txt2img-samples")
    cli.add_model_options(options)
    cli.add_rank_options(options)
    cli.add_laion_option(options)
    cli.add_telling_options(options)
    cli.add_report_options(options)
    return options


def main(argv: Sequence[str] | None = None) -> int:
    return cli.main(parser(), cli.run, argv)


if __name__ == "__main__":
    sys.exit(main())
