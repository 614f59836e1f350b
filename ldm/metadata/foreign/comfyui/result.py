"""Nodes after the first pass: a second pass, which is upscaling, and the final image."""

from __future__ import annotations

from collections.abc import Sequence

from ldm.metadata.foreign.comfyui.graph import Node
from ldm.metadata.foreign.comfyui.nodes import RESIZERS
from ldm.metadata.foreign.comfyui.passes import Passes
from ldm.metadata.foreign.comfyui.sizes import Size, output_size

_MAX_UPSCALE = 8


def read_second_pass(passes: Passes) -> None:
    """Reads upscaling, if nothing else is between the second pass's sampler and the first's."""
    if len(passes.samplers) == 1:
        return
    draft = passes.draft
    for node in passes.between:
        passes.expect(node)
    resizers = [node for node in passes.between if node.kind in RESIZERS]
    first = _first_size(passes)
    second = output_size(passes.graph, resizers, first)
    if resizers and second is None and len(passes.samplers) == 2:
        second = passes.origin.size
    denoise = passes.graph.number(passes.samplers[-2], "denoise")
    if resizers and first and second and denoise is not None and 1 < second[0] / first[0] <= _MAX_UPSCALE:
        draft.number("upscale_strength", denoise)
        _set_upscaling(passes, first, second, resizers)
    else:
        draft.note("its later passes are left out")
    if len(passes.samplers) > 2:
        draft.note(f"{len(passes.samplers)} passes; at most two are made here")


def _first_size(passes: Passes) -> Size | None:
    values = passes.draft.values
    width, height = values.get("width", 0), values.get("height", 0)
    return (width, height) if width and height else None


def _set_upscaling(passes: Passes, first: Size, second: Size, resizers: Sequence[Node]) -> None:
    """Sets the upscaling from the first pass's size to the second's by these nodes."""
    draft = passes.draft
    draft.number("upscale", second[0] / first[0])
    if abs(second[1] / first[1] - second[0] / first[0]) > 8 / first[1]:
        draft.note(
            f"its second pass is {second[0]}x{second[1]}, of other proportions; its width's factor is used"
        )
    in_latents = all(node.kind.startswith("Latent") for node in resizers)
    draft.values["upscale_in"] = "latents" if in_latents else "pixels"
    if not in_latents and any(node.kind == "ImageUpscaleWithModel" for node in resizers):
        draft.note("an upscaling model is not here; Lanczos is used")
    draft.note("its second pass has settings and noise of its own; the first pass's are used")


def read_result(passes: Passes) -> None:
    """Notes what is done after the last pass, a size that is not the file's, and values that are not known."""
    graph, origin, draft = passes.graph, passes.origin, passes.draft
    for node in passes.after_last:
        passes.expect(node)
        if node.kind in RESIZERS:
            draft.note(f"left out: node {node.kind} after the last pass")
    if passes.size and origin.size and passes.size != origin.size:
        draft.note(
            f"its graph makes {passes.size[0]}x{passes.size[1]} pixels; the file has "
            f"{origin.size[0]}x{origin.size[1]}"
        )
    for kind in graph.foreign:
        draft.note(f"a value comes from node {kind}, which is not known here")
    for link in graph.lost:
        draft.note(f"{link}, which its graph lacks")
