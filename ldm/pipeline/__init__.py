"""Job -> conditioning -> latents -> pixels: the Python API."""

from ldm.models.diffusion.solvers import SOLVERS as SOLVERS
from ldm.pipeline.load import load_model as load_model
from ldm.pipeline.picture import OnStep as OnStep
from ldm.pipeline.picture import Pending as Pending
from ldm.pipeline.picture import Picture as Picture
from ldm.pipeline.picture import StepInfo as StepInfo
from ldm.pipeline.pipeline import Pipeline as Pipeline
from ldm.pipeline.placement import LOW_MEMORY as LOW_MEMORY
