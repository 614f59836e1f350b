#!/usr/bin/env python
"""Makes pictures again from what their files say, as they were or with other options.

Any option of the scripts that make pictures changes what the file says.
"""

from __future__ import annotations

import argparse
import runpy
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from ldm import cli  # this toolkit's own, whatever else is installed
from ldm.cli.remake import add_replay_options, replay
from ldm.cli.replay import as_changes

sys.path.pop(0)  # its parts are found through it from here on; the folder itself may be the user's


def parser() -> argparse.ArgumentParser:
    options = cli.make_parser(__doc__ or "")
    cli.add_prompt_options(options, prompt="")
    cli.add_image_options(options, strength=1.0, required=False)
    cli.add_mask_options(options)
    cli.add_sampling_options(options, scale=7.5)
    cli.add_size_options(options, own="the picture's own size")
    cli.add_upscale_options(options)
    cli.add_batch_options(options, n_iter=1, n_samples=1)
    cli.add_output_options(options, outdir="")
    cli.add_model_options(options)
    as_changes(options)
    add_replay_options(options)
    cli.add_telling_options(options)
    cli.add_report_options(options)
    return options


def _parser_of(script: str) -> Callable[[], argparse.ArgumentParser]:
    return runpy.run_path(str(Path(__file__).with_name(f"{script}.py")))["parser"]


def main(argv: Sequence[str] | None = None) -> int:
    parsers = {script: _parser_of(script) for script in ("txt2img", "img2img", "inpaint")}
    return cli.main(parser(), partial(replay, parsers=parsers), argv)


if __name__ == "__main__":
    sys.exit(main())
