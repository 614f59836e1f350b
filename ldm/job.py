"""The one thing that flows through the toolkit: a picture that somebody asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Job:
    """One image to make. Whatever asks for images makes jobs; everything after that sees only jobs.

    Sizes are in pixels (multiples of 8), `steps` counts denoising steps, `scale` is the classifier-free
    guidance scale (1 turns guidance off), `eta` the DDIM noise factor. With `seed_mode` "image" the job owns
    the noise stream of `seed`; with "batch" it is entry `batch_index` of the run's one stream from `seed`,
    drawn in the order of the original scripts.
    """

    prompt: str
    negative_prompt: str = ""
    seed: int = 42
    width: int = 512
    height: int = 512
    steps: int = 50
    sampler: str = "ddim"
    scale: float = 7.5
    eta: float = 0.0
    timestep_spacing: str = "uniform"
    rng: Literal["philox", "cpu", "device"] = "philox"
    seed_mode: Literal["image", "batch"] = "image"
    batch_index: int = 0
