"""Warns of requests that a model does not handle well, before sampling."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from ldm.files import read_side_file
from ldm.job import Job
from ldm.places import find
from ldm.runs.models import own_side
from ldm.util import printable

logger = logging.getLogger("ldm")

BUNDLED_CARD = "models/ldm/shapes/README.md"
_PLMS_STEPS = 25  # below it PLMS, whose first steps are of lower order, is inaccurate
_MOST_WORDS = 10


def note_jobs(jobs: Iterable[Job], model: Mapping[str, Any]) -> None:
    """Prints warnings for jobs that a model does not handle well: sizes, few steps, words that it does not know."""
    side, words = own_side(model), _known_words(model)
    largest, few, unknown = (0, 0), None, dict[str, None]()
    for job in jobs:
        largest = max(largest, job.upscaled_size, key=math.prod)
        few = job.steps if few is None and job.sampler == "plms" and job.steps < _PLMS_STEPS else few
        if words is not None and len(unknown) <= _MOST_WORDS:
            unknown |= dict.fromkeys(
                w for w in re.findall(r"[^\W\d_]+", job.prompt.lower()) if w not in words
            )
    if math.prod(largest) > 2 * side * side:
        logger.info(
            "this model was trained at %dx%d; at %dx%d objects may repeat", side, side, *reversed(largest)
        )
    if few is not None:
        logger.info(
            "PLMS needs about 50 steps, not %d; --dpm_solver gives good images in 10 to 20 steps, DDIM in 25",
            few,
        )
    if unknown:
        named = ", ".join(printable(word) for word in list(unknown)[:_MOST_WORDS])
        more = ", ..." if len(unknown) > _MOST_WORDS else ""
        logger.info(
            "the bundled model does not know: %s%s (%s lists what it draws)", named, more, BUNDLED_CARD
        )


def _known_words(model: Mapping[str, Any]) -> frozenset[str] | None:
    """Returns the words that a model was trained on, if its vocabulary's folder lists them; else None."""
    from ldm.config import section

    version = section(model, "cond_stage_config").get("version")
    path = find(version) / "words.txt" if isinstance(version, str) else None
    if path is None or not path.is_file():
        return None
    return frozenset(read_side_file(path, 1_000_000).decode("utf-8").split())
