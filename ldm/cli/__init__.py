"""The command line: shared by all commands."""

import sys

if sys.version_info < (3, 10):  # noqa: UP036 - older Pythons cannot read what is imported below
    _found = ".".join(map(str, sys.version_info[:2]))
    print(f"error: Python {_found} is too old; use Python 3.10 or newer", file=sys.stderr)
    sys.exit(2)

try:
    from ldm.cli.app import main
    from ldm.cli.model_options import add_laion_option, add_model_options, add_rank_options
    from ldm.cli.options import (
        add_batch_options,
        add_control_options,
        add_image_options,
        add_mask_options,
        add_output_options,
        add_prompt_options,
        add_report_options,
        add_sampling_options,
        add_size_options,
        add_telling_options,
        add_upscale_options,
        add_version_option,
        make_parser,
    )
except KeyboardInterrupt:  # before any work has begun
    raise SystemExit(130) from None

__all__ = [
    "add_batch_options",
    "add_control_options",
    "add_image_options",
    "add_laion_option",
    "add_mask_options",
    "add_model_options",
    "add_output_options",
    "add_prompt_options",
    "add_rank_options",
    "add_report_options",
    "add_sampling_options",
    "add_size_options",
    "add_telling_options",
    "add_upscale_options",
    "add_version_option",
    "main",
    "make_parser",
]
