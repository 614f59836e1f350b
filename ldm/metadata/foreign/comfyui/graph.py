"""The nodes of a ComfyUI workflow, the links between them, and the values of linked inputs."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from ldm.json_value import Json, as_text, load_json
from ldm.util import InputError

MAX_NODES = 10_000
_MAX_VALUE_LINKS = 64
_MAX_SETTINGS = 16  # nodes in a row that hold a sampler's settings
_MAX_TEXT = 100_000
_PIPES = ("basic_pipe", "pipe")
_SETTINGS = ("noise", "guider", "sampler", "sigmas", *_PIPES)
_NUMBERS = ("value", "int", "float", "number", "seed", "noise_seed")
_TEXTS = ("populated_text", "text", "string", "value", "prompt")
_PARTS = re.compile(r"(text|string|prompt)_?([a-z]|[0-9]{1,2})")  # inputs of a node that joins texts
# Nodes that hold one value or pass it on unchanged.
_HOLDERS = {
    "PrimitiveNode", "PrimitiveInt", "PrimitiveFloat", "PrimitiveBoolean", "PrimitiveString",
    "PrimitiveStringMultiline", "Reroute", "Int", "Float", "String", "Text", "Seed", "Int Literal", "Float Literal",
    "String Literal", "Seed (rgthree)", "Seed Everywhere", "Text Multiline", "Text String", "Text box", "CR Seed",
    "CR Integer", "CR Float", "CR Text", "CR Prompt Text", "easy seed", "easy int", "easy float", "easy string",
    "easy positive", "easy negative", "INTConstant", "FloatConstant", "StringConstant", "StringConstantMultiline",
    "JWInteger", "JWFloat", "JWString", "JWStringMultiline", "ImpactInt", "Constant Number", "ShowText|pysssss",
    "StringConcatenate", "ImpactSwitch", "Any Switch (rgthree)", "ComfySwitchNode", "CheckpointLoaderSimple",
    "ImpactWildcardProcessor",
}  # fmt: skip


class Node(NamedTuple):
    """One node of a graph."""

    name: str
    kind: str
    inputs: Mapping[str, Json]


class Graph:
    """The nodes of a workflow. A chain has each node once, even if links form a circle.

    `foreign` collects the kinds of nodes that gave a value and may have computed it, `lost` the links that lead
    to no node.
    """

    def __init__(self, nodes: Mapping[str, Node]) -> None:
        self.nodes = nodes
        self.foreign: dict[str, None] = {}
        self.lost: dict[str, None] = {}

    def linked(self, node: Node, *names: str) -> Node | None:
        """Returns the node linked to the first of these inputs that is a link."""
        for name in names:
            if link := as_link(node.inputs.get(name)):
                if link[0] in self.nodes:
                    return self.nodes[link[0]]
                self.lost[f"`{name[:50]}` of node {node.name[:20]} comes from node {link[0][:20]}"] = None
        return None

    def output(self, node: Node, *names: str) -> int:
        """Returns the other node's output that the first of these inputs that is a link uses."""
        return next((link[1] for name in names if (link := as_link(node.inputs.get(name)))), 0)

    def before(self, node: Node, *names: str) -> Node | None:
        """Returns the node linked to these inputs, to the input that a switch has chosen, or to the only link."""
        return self.linked(node, *names) or self.linked(node, *_chosen(node))

    def chain(self, node: Node | None, *names: str) -> Iterator[Node]:
        """Yields `node`, the node linked to these inputs, and so on; each node once, so that a circle ends."""
        passed: set[str] = set()
        while node is not None and node.name not in passed:
            passed.add(node.name)
            yield node
            node = self.before(node, *names)

    def number(self, node: Node, *names: str) -> int | float | None:
        """Returns the first of these inputs that is or links to a number, written as one or as text; else None."""
        return self._value(node, names, _NUMBERS, as_number, [_MAX_VALUE_LINKS])

    def text(self, node: Node, *names: str) -> str | None:
        """Returns the first of these inputs that is text or linked to a node that holds or joins text; else None."""
        return self._value(node, names, _TEXTS, widget_text, [_MAX_VALUE_LINKS])

    def _value(
        self,
        node: Node,
        names: tuple[str, ...],
        more: tuple[str, ...],
        read: Callable[[Json], Any],
        left: list[int],
    ) -> Any:
        first = node
        while left[0] > 0:
            left[0] -= 1
            for name in names:
                if (value := read(node.inputs.get(name))) is not None:
                    return value
            source = self.linked(node, *names) if node is first else self.before(node, *names)
            if source is None:
                return self._joined(node, left) if read is widget_text else None
            node, names = source, (*names, *more)
            if node.kind not in _HOLDERS:
                self.foreign[node.kind] = None
        return None

    def _joined(self, node: Node, left: list[int]) -> str | None:
        """Returns the text that a joining node makes."""
        names = sorted(name for name in node.inputs if _PARTS.fullmatch(name))
        if not names or not re.search("concat|join", node.kind, re.IGNORECASE):
            return None
        between = next(
            (t for n in ("delimiter", "separator") if (t := widget_text(node.inputs.get(n))) is not None), ""
        )
        parts = [self._value(node, (name,), _TEXTS, widget_text, left) for name in names]
        return between.join(part for part in parts if part is not None)[:_MAX_TEXT]

    def sampler(self, node: Node) -> Node:
        """Returns a sampler whose inputs include the settings of the nodes linked to it."""
        inputs = dict(node.inputs)
        for name in _SETTINGS:
            for source in itertools.islice(self.chain(self.linked(node, name), name), _MAX_SETTINGS):
                own = dict(source.inputs)
                if source.kind == "BasicGuider":  # it has no negative prompt, so no guidance
                    own |= {"cfg": 1.0, "positive": own.pop("conditioning", None)}
                elif name == "sampler":
                    own.setdefault("sampler_name", source.kind)
                elif name == "sigmas" and "steps" in own:
                    own.setdefault("scheduler", source.kind)
                inputs = {**own, **inputs}
        return Node(node.name, node.kind, inputs)

    def samples(self, node: Node) -> bool:
        """Returns whether a node is a sampler: it or the nodes linked to it have a sampler's settings."""
        if "latent_image" not in node.inputs:
            return False
        inputs = self.sampler(node).inputs
        return {"steps", "sampler_name"} <= inputs.keys() or {"sigmas", "sampler"} <= inputs.keys()


def read_graph(text: str) -> Graph:
    """Reads the graph in a text; `InputError` for a text that is not a graph in ComfyUI's API form."""
    try:
        content = load_json(text)
    except ValueError:
        raise InputError("it is not JSON") from None
    if isinstance(content, dict):
        if isinstance(content.get("nodes"), list):
            raise InputError(
                "it is a workflow as ComfyUI's editor keeps it, without the values that were run; "
                "run it in ComfyUI again: the image that it makes then carries them"
            )
        content = next(
            (inner for key in ("prompt", "output") if isinstance(inner := content.get(key), dict)), content
        )
    if not isinstance(content, dict) or len(content) > MAX_NODES:
        raise InputError(f"it is not a graph of at most {MAX_NODES} nodes")
    nodes: dict[str, Node] = {}
    for key, node in content.items():
        if isinstance(node, dict) and isinstance(inputs := node.get("inputs"), dict):
            nodes[key] = Node(key, as_text(node.get("class_type"))[:100], inputs)
    return Graph(nodes)


def as_link(value: Json) -> tuple[str, int] | None:
    """Returns the node id and the output index of an input that is a link; else None."""
    if not isinstance(value, list) or not 0 < len(value) <= 2 or not isinstance(value[0], (str, int)):
        return None
    return str(value[0]), value[1] if len(value) > 1 and type(value[1]) is int else 0


def widget_text(value: Json) -> str | None:
    """Returns a text, also one that a widget keeps with its preview; else None."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def as_number(value: Json) -> int | float | None:
    """Returns a number, also one written as text, as ComfyUI reads it; else None."""
    if isinstance(value, str) and len(value) < 50:
        try:
            return int(value) if re.fullmatch(r"\s*[+-]?[0-9]+\s*", value) else float(value)
        except ValueError:
            return None
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def as_whole(value: int | float | None) -> int | float | None:
    """Returns a number without its fraction, as ComfyUI reads integers; one beyond 64 bits as it is."""
    return int(value) if isinstance(value, float) and abs(value) < 2**64 else value


def _chosen(node: Node) -> list[str]:
    """Returns the input that a switch has chosen, or a node's only input."""
    links = [name for name, value in node.inputs.items() if as_link(value)]
    if len(node.inputs) == 1 or node.kind == "Any Switch (rgthree)":
        return sorted(links)[:1]
    if node.kind == "ImpactSwitch":
        return [f"input{as_number(node.inputs.get('select'))}"]
    if node.kind == "ComfySwitchNode" and isinstance(chosen := node.inputs.get("switch"), bool):
        return ["on_true" if chosen else "on_false"]
    return []
