"""Job -> conditioning -> latents -> pixels: the Python API."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from ldm.models.diffusion.solvers import SOLVERS as SOLVERS
from ldm.pipeline.image import GeneratedImage as GeneratedImage
from ldm.pipeline.image import OnStep as OnStep
from ldm.pipeline.image import Pending as Pending
from ldm.pipeline.image import StepInfo as StepInfo
from ldm.pipeline.load import load_model as load_model
from ldm.pipeline.load import packed_weights as packed_weights
from ldm.pipeline.pipeline import Pipeline as Pipeline
from ldm.pipeline.placement import LOW_MEMORY as LOW_MEMORY

if TYPE_CHECKING:
    from ldm.models.diffusion.sampler import Sampler


def __getattr__(name: str) -> dict[str, type[Sampler]]:
    """Returns the classes of samplers by name, under the name that this table had before `SOLVERS`."""
    if name != "SAMPLERS":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(
        "ldm.pipeline.SAMPLERS is now SOLVERS, whose rows load the classes", DeprecationWarning, stacklevel=2
    )
    return {sampler: row.load() for sampler, row in SOLVERS.items()}


Picture = GeneratedImage  # its former name
