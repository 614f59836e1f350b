"""Options that have no effect because of another option, or of its absence."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable

from ldm.job import Init

logger = logging.getLogger("ldm")

_OPTIONS_WITHOUT_EFFECT: tuple[tuple[str, Callable[[argparse.Namespace], bool]], ...] = (
    (
        "--upscale_in and --upscale_strength have no effect without --upscale",
        lambda opt: opt.upscale == 1 and (opt.upscale_in, opt.upscale_strength) != ("pixels", 0.5),
    ),
    (
        "--guidance_interval_in has no effect without --guidance_interval",
        lambda opt: opt.guidance_interval_in == "sigma" and opt.guidance_interval == (0.0, 1.0),
    ),
    (
        "--prompt_format has no effect without --from-file",
        lambda opt: opt.prompt_format != "auto" and opt.from_file is None,
    ),
    (
        "--prompt has no effect with --from-file, whose prompts are used",
        lambda opt: opt.from_file is not None and opt.prompt != opt.default_prompt,
    ),
    (
        "--invert_mask has no effect without a mask: what --outpaint adds is repainted",
        lambda opt: opt.invert_mask and any(opt.outpaint) and not (opt.mask or opt.indir),
    ),
    (
        "--mask_blur has no effect with --no_paste, which blends nothing",
        lambda opt: opt.no_paste and opt.mask_blur != Init("").mask_blur,
    ),
    (
        "--resize has no effect without --W or --H",
        lambda opt: (
            opt.resize not in (None, "none")
            and opt.W is opt.H is None
            and opt.from_file is None
            and not opt.sweep
        ),
    ),
    (
        "--tiles on has no effect on images of up to 512 pixels a side, which are one tile unless memory is short",
        lambda opt: opt.tiles == "on" and _fit_into_a_tile(opt),
    ),
    (
        "--n_rows has no effect with --skip_grid",
        lambda opt: opt.skip_grid and opt.n_rows > 0,
    ),
    (
        "--negative_prompt has no effect at --scale 1, which turns guidance off",
        lambda opt: opt.scale == 1 and bool(opt.negative_prompt) and opt.from_file is None and not opt.sweep,
    ),
)


def _fit_into_a_tile(opt: argparse.Namespace) -> bool:
    """Returns whether all images are certain to: a list, a sweep or an image can give a size, a config the usual."""
    from ldm.runtime.tiling import TILES

    if opt.from_file is not None or opt.sweep or any(opt.outpaint):
        return False
    sides = opt.W, opt.H
    if None in sides and (opt.init_img or opt.indir or opt.config):
        return False
    return max(side or 0 for side in sides) * opt.upscale <= TILES[0] * opt.f


def warn_of_options_without_effect(opt: argparse.Namespace) -> None:
    """Warns of each pair of options of which one disables the other; a list or a sweep may set the rest."""
    for message, applies in _OPTIONS_WITHOUT_EFFECT:
        if applies(opt):
            logger.warning("%s", message)
