"""The filters of a run for its finished images: the safety check and the watermark that its options select."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from ldm.runs.grids import Mark
from ldm.runs.options import RunOptions
from ldm.util import need

if TYPE_CHECKING:
    import torch

    from ldm.safety.screen import Screen

logger = logging.getLogger("ldm")


def make_mark(options: RunOptions) -> Mark:
    """Returns the function that watermarks an image; a missing library is reported before the model is loaded."""
    if options.no_watermark:
        return lambda rgb: rgb
    from ldm.images.watermark import INPAINTING_TEXT, TEXT, Watermark

    return Watermark(INPAINTING_TEXT if options.inpaint else TEXT).mark


def make_screen(options: RunOptions, device: torch.device) -> Screen:
    """Returns the safety check that --safety selects."""
    from ldm.safety.load import OWN_FOLDER, find_safety_model, load_safety_model
    from ldm.safety.screen import Screen

    path = None if options.safety == "off" else find_safety_model(options.safety_model)
    if path is not None:
        checker = load_safety_model(path, device)
        return Screen(checker, checker.side)
    where = f"put the files of CompVis/stable-diffusion-safety-checker into {OWN_FOLDER}"
    need(options.safety != "on", f"--safety on: no safety model found; {where}")
    if options.safety == "auto":
        logger.info("safety check: no model found, images are unchecked; %s", where)
    return Screen(None)
