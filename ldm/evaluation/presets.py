"""Protocols: which prompts, settings and measures an evaluation has by default."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SOURCES = ("scenes", "skills")  # of prompts without a file, in the bundled model's domain
_CARD_SCALES = "scale=1.5,2,3,4,5,6,7,8"
_CARD = ("--sampler", "plms", "--ddim_steps", "50")  # in words that a variant may give again
_BUNDLED = (*_CARD, "--W", "128", "--H", "128", "--n_samples", "20")


@dataclass(frozen=True)
class Preset:
    """The defaults of `run`: prompts, their number, sweeps, txt2img's options; and those of `score`.

    Empty `prompts` are to be given.
    """

    prompts: str
    count: int | None
    sweep: tuple[str, ...]
    options: tuple[str, ...]
    scoring: Mapping[str, Any] = field(default_factory=dict[str, Any])


PRESETS: Mapping[str, Preset] = {
    # the model cards of v1-1 to v1-5: 50 PLMS steps, 10,000 random prompts of COCO2017's validation set at 512x512
    "card": Preset(
        "", 10_000, (_CARD_SCALES,), (*_CARD, "--W", "512", "--H", "512", "--n_samples", "8"),
        {"metrics": "fid,clip", "network": "inception", "size": 512},
    ),
    # the same protocol in the bundled model's domain; the features of its reader are 64, so FID needs 128 images
    "scenes": Preset(
        "scenes", 160, (_CARD_SCALES,), _BUNDLED,
        {"metrics": "fid,answers", "network": "shapes", "against": "scenes:2000"},
    ),
    "skills": Preset(
        "skills", 100, (), _BUNDLED,
        {"metrics": "skills", "network": "shapes"},
    ),
}  # fmt: skip
