"""The sizes, width and height in pixels, of what a graph's nodes make."""

from __future__ import annotations

from collections.abc import Sequence

from ldm.metadata.foreign.comfyui.graph import Graph, Node
from ldm.metadata.foreign.comfyui.nodes import KEEP_SIZE, RESIZERS

Size = tuple[int, int]

_MAX_SIDE = 2**20


def output_size(graph: Graph, chain: Sequence[Node], size: Size | None = None) -> Size | None:
    """Returns the output size of the nodes from an end to a start of `size`; None if it is not determined."""
    for node in reversed(chain):
        if empty := empty_size(graph, node):
            size = empty
        elif node.kind in RESIZERS:
            size = _resized(graph, node, size) if size and max(size) < _MAX_SIDE else None
        elif node.kind not in KEEP_SIZE and not graph.samples(node):
            size = None
        if size is not None and not all(size):  # less than a cell of the latents, or scaled to nothing
            size = None
    return size


def empty_size(graph: Graph, node: Node) -> Size | None:
    """Returns the size of the empty latent that a node makes; None if it makes none."""
    if not (node.kind.startswith("Empty") or "empty_latent_width" in node.inputs):
        return None
    width, height = (graph.number(node, side, f"empty_latent_{side}") for side in ("width", "height"))
    if width is None or height is None or not (0 < width < _MAX_SIDE and 0 < height < _MAX_SIDE):
        return None
    return int(width) // 8 * 8, int(height) // 8 * 8


def _resized(graph: Graph, node: Node, size: Size) -> Size | None:
    """Returns the size to which a node resizes `size`; None if it depends on a file, such as an upscaling network."""
    factor = graph.number(node, "scale_by")
    if factor is not None and 0 < factor <= 64:
        cell = 8 if node.kind.startswith("Latent") else 1
        return round(size[0] / cell * factor) * cell, round(size[1] / cell * factor) * cell
    width, height = (graph.number(node, side) for side in ("width", "height"))
    if width is None or height is None or not (0 <= width < _MAX_SIDE and 0 <= height < _MAX_SIDE):
        return None
    if not (width and height):  # the side that is 0 follows from the other
        width = width or round(size[0] * height / size[1]) or size[0]
        height = height or round(size[1] * width / size[0]) or size[1]
    return int(width), int(height)
