"""The command line: what every script shares."""

from ldm.cli.options import (
    add_batch_options,
    add_image_options,
    add_laion_option,
    add_mask_options,
    add_model_options,
    add_output_options,
    add_prompt_options,
    add_rank_options,
    add_report_options,
    add_sampling_options,
    add_size_options,
    add_telling_options,
    add_upscale_options,
    make_parser,
)
from ldm.cli.report import main
from ldm.cli.run import run

__all__ = [
    "add_batch_options",
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
    "main",
    "make_parser",
    "run",
]
