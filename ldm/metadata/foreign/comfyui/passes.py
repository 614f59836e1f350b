"""The passes of a graph: its samplers, from the node that saved the image back to the first one."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NamedTuple

from ldm.metadata.foreign.comfyui.graph import Graph, Node, as_link, widget_text
from ldm.metadata.foreign.comfyui.nodes import TOWARDS_START, UNDERSTOOD
from ldm.metadata.foreign.comfyui.sizes import Size, output_size
from ldm.metadata.infotext import file_name
from ldm.metadata.recipe import Draft, Origin
from ldm.util import InputError

_MAX_ENDS = 100


@dataclass(frozen=True)
class Passes:
    """The nodes from the one that saved the image (`chain[0]`) to a start, and the draft of the image's recipe.

    `samplers` are those of the chain with their settings, the first pass's last; `first` and `last` are the indices
    of the first and the last pass's in the chain. `size` is the size of the image that the chain makes, if it is
    determined.
    """

    graph: Graph
    origin: Origin
    chain: tuple[Node, ...]
    size: Size | None
    places: tuple[int, ...]
    samplers: tuple[Node, ...]
    controlled: dict[str, None] = field(default_factory=dict[str, None])  # nodes whose ControlNets were read
    draft: Draft = field(default_factory=lambda: Draft("ComfyUI"))

    @property
    def sampler(self) -> Node:
        """The first pass's sampler with its settings."""
        return self.samplers[-1]

    @property
    def before_first(self) -> tuple[Node, ...]:
        """The nodes before the first pass's sampler, the nearest first."""
        return self.chain[self.places[-1] + 1 :]

    @property
    def between(self) -> tuple[Node, ...]:
        """The nodes between the second pass's sampler and the first's; () if there is one pass."""
        return self.chain[self.places[-2] + 1 : self.places[-1]] if len(self.places) > 1 else ()

    @property
    def after_last(self) -> tuple[Node, ...]:
        """The nodes after the last pass's sampler, the one that saved the image first."""
        return self.chain[: self.places[0]]

    def expect(self, node: Node) -> None:
        """Notes a node that is not understood."""
        if node.kind not in UNDERSTOOD:
            self.draft.note(f"left out: node {node.kind}")


class _End(NamedTuple):
    """A node that may have saved the image: the nodes from there to a start, and the size of the image."""

    chain: tuple[Node, ...]
    size: Size | None
    rank: tuple[int, ...]


def find_passes(graph: Graph, origin: Origin) -> Passes:
    """Returns the passes that made the file. Raises InputError for a graph without a known sampler."""
    end = _find_end(graph, origin)
    graph = Graph(graph.nodes)  # what the search noted of other ends is not about this image
    places = tuple(i for i, node in enumerate(end.chain) if graph.samples(node))
    samplers = tuple(graph.sampler(end.chain[i]) for i in places)
    return Passes(graph, origin, end.chain, end.size, places, samplers)


def _find_end(graph: Graph, origin: Origin) -> _End:
    """Finds the end of the graph that made the file: by its size, saved rather than previewed, and by its name."""
    nodes = graph.nodes.values()
    values = (value for node in nodes for value in node.inputs.values())
    used = {link[0] for value in values if (link := as_link(value))}
    ends = [node for node in nodes if "images" in node.inputs or _saves(node)]
    samplers = [node for node in nodes if graph.samples(node)]
    found = [
        _end(graph, end, goes_on=end.name in used, origin=origin) for end in ends[:_MAX_ENDS] or samplers[:1]
    ]
    found = [end for end in found if any(map(graph.samples, end.chain))]
    if not found and samplers:
        found = [_end(graph, samplers[0], goes_on=False, origin=origin)]
    if not found:
        kinds = sorted({node.kind for node in nodes if "ampler" in node.kind})
        raise InputError(
            f"its graph has no sampler that is known here{': it has ' * bool(kinds)}{', '.join(kinds[:5])}"
        )
    return min(found, key=lambda end: end.rank)


def _end(graph: Graph, node: Node, *, goes_on: bool, origin: Origin) -> _End:
    chain = tuple(graph.chain(node, *TOWARDS_START))
    size = output_size(graph, chain)
    return _End(chain, size, _rank(node, size, goes_on, origin))


def _rank(node: Node, size: Size | None, goes_on: bool, origin: Origin) -> tuple[int, ...]:
    """Returns the rank of an end; that with the lowest is the file's."""
    prefix = file_name(widget_text(node.inputs.get("filename_prefix")) or "").partition("%")[0]
    return (
        1 if size is None or origin.size is None else 0 if size == origin.size else 2,
        1 if goes_on else 0,
        0 if _saves(node) else 1,
        0 if prefix and origin.name.startswith(prefix) else 1,
    )


def _saves(node: Node) -> bool:
    return re.search("save", node.kind, re.IGNORECASE) is not None
