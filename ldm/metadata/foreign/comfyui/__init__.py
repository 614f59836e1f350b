"""Reads ComfyUI's graph: nodes by id, each with a class and inputs that are values or links to nodes' outputs.

The graph is followed from the node that saved the image back to the initial latent or image. Each node on that
path is understood, or named in a note.
"""

from __future__ import annotations

from ldm.metadata.foreign.comfyui.conditioning import read_prompts
from ldm.metadata.foreign.comfyui.graph import read_graph
from ldm.metadata.foreign.comfyui.models import read_models
from ldm.metadata.foreign.comfyui.passes import find_passes
from ldm.metadata.foreign.comfyui.result import read_result, read_second_pass
from ldm.metadata.foreign.comfyui.sampling import read_noise, read_schedule, read_settings
from ldm.metadata.foreign.comfyui.start import read_start
from ldm.metadata.recipe import UNKNOWN, Origin, Recipe


def read(text: str, origin: Origin = UNKNOWN) -> Recipe:
    """Returns the recipe of an image from a graph in ComfyUI's API form.

    It is that of the first pass, with a second pass as upscaling, and notes on everything else. Raises InputError
    for a text that is not such a graph, and for a graph without a known sampler.
    """
    passes = find_passes(read_graph(text), origin)
    read_settings(passes)
    encoders = read_prompts(passes)
    read_models(passes, encoders)
    start = read_start(passes)
    read_schedule(passes, start)
    read_noise(passes, start)
    read_second_pass(passes)
    read_result(passes)
    return passes.draft.finish()
