"""ComfyUI's graph: nodes by id, each with a class and inputs that are values or links to other nodes' outputs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ldm.images.foreign.recipe import UNKNOWN, Draft, Origin, Recipe
from ldm.images.metadata import file_name
from ldm.util import InputError

MAX_NODES = 10_000
_MAX_VALUE_LINKS = 16
_SETTINGS = {
    "steps",
    "cfg",
    "sampler_name",
}  # the inputs of a sampler, its own or those of the nodes beside it
_BESIDE_SAMPLER = ("noise", "guider", "sampler", "sigmas")
_TOWARDS_START = ("images", "image", "samples", "latent_image", "pixels")
_VALUES = ("value", "text", "string", "int", "float", "number", "seed", "noise_seed")
_EXPECTED = {
    "KSampler", "KSamplerAdvanced", "SamplerCustom", "SamplerCustomAdvanced", "CLIPTextEncode", "ConditioningZeroOut",
    "EmptyLatentImage", "VAEDecode", "VAEEncode", "LoadImage", "CheckpointLoaderSimple", "LoraLoader",
    "LoraLoaderModelOnly", "SaveImage", "PreviewImage", "Reroute", "LatentUpscale", "LatentUpscaleBy", "ImageScale",
    "ImageScaleBy",
}  # fmt: skip


class Node(NamedTuple):
    """One node of a graph."""

    kind: str
    inputs: Mapping[str, Any]


class Graph:
    """The nodes of a workflow. Whatever it links to what, a walk passes each node once."""

    def __init__(self, nodes: Mapping[str, Node]) -> None:
        self.nodes = nodes

    def linked(self, node: Node, *names: str) -> Node | None:
        """The node behind the first of these inputs that is a link."""
        for name in names:
            link = node.inputs.get(name)
            if (
                isinstance(link, list)
                and link
                and isinstance(link[0], (str, int))
                and str(link[0]) in self.nodes
            ):
                return self.nodes[str(link[0])]
        return None

    def walk(self, node: Node | None, *names: str) -> Iterator[Node]:
        """`node`, and what lies behind these inputs of it, and so on; each node once, so that a circle ends."""
        passed: set[int] = set()
        while node is not None and id(node) not in passed:
            passed.add(id(node))
            yield node
            node = self.linked(node, *names)

    def value(self, node: Node, *names: str) -> Any:
        """The first of these inputs that is a value, or is linked to a node that holds one; else None."""
        for _ in range(_MAX_VALUE_LINKS):
            for name in names:
                if isinstance(node.inputs.get(name), (str, int, float)):
                    return node.inputs[name]
            source = self.linked(node, *names)
            if source is None:
                return None
            node, names = source, (*names, *_VALUES)
        return None

    def sampler(self, node: Node) -> Node:
        """A sampler with the settings of the nodes beside it, where it has any, as its own."""
        inputs = dict(node.inputs)
        for name in _BESIDE_SAMPLER:
            if beside := self.linked(node, name):
                inputs = {**beside.inputs, **inputs}
        return Node(node.kind, inputs)

    def samples(self, node: Node) -> bool:
        """Whether a node is a sampler: what it needs stands in it or in the nodes beside it."""
        beside = [other for name in _BESIDE_SAMPLER if (other := self.linked(node, name))]
        return "latent_image" in node.inputs and all(
            any(setting in part.inputs for part in (node, *beside)) for setting in _SETTINGS
        )


def read(text: str, _: Origin = UNKNOWN) -> Recipe:
    """The recipe of a picture with a graph in ComfyUI's API form."""
    graph = _graph(text)
    way = _way(graph)
    passes = [i for i, node in enumerate(way) if graph.samples(node)]
    first = way[passes[-1]]
    draft = Draft("ComfyUI")
    _prompts(graph, first, draft)
    _settings(graph, first, draft)
    _model(graph, first, draft)
    batch = _start(graph, first, draft)
    _timesteps(graph, first, draft)
    if len(passes) > 1:
        _second_pass(graph, way[passes[-2] : passes[-1]], draft)
    if len(passes) > 2:
        draft.note(f"{len(passes)} passes; at most two are made here")
    _noise(batch, draft)
    return draft.finish()


def _graph(text: str) -> Graph:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        raise InputError("it is no JSON") from None
    if not isinstance(content, dict) or len(content) > MAX_NODES:
        raise InputError(f"it is no graph of at most {MAX_NODES} nodes")
    nodes = {}
    for key, node in content.items():
        if isinstance(node, dict) and isinstance(node.get("inputs"), dict):
            kind = node.get("class_type")
            nodes[key] = Node(kind[:100] if isinstance(kind, str) else "", node["inputs"])
    return Graph(nodes)


def _way(graph: Graph) -> list[Node]:
    """The nodes from a picture that is saved back to what it starts from, with at least one sampler."""
    ends = [node for node in graph.nodes.values() if "images" in node.inputs]
    for end in [*ends[:100], *(node for node in graph.nodes.values() if graph.samples(node))]:
        way = list(graph.walk(end, *_TOWARDS_START))
        if any(map(graph.samples, way)):
            return way
    raise InputError("its graph has no sampler that is known here")


def _prompts(graph: Graph, first: Node, draft: Draft) -> None:
    sampler = graph.sampler(first)
    for role, name in (("positive", "prompt"), ("negative", "negative_prompt")):
        behind = (role, "conditioning", "conditioning_1", "conditioning_to")
        for node in list(graph.walk(sampler, *behind))[1:]:
            _expect(node, draft)
            text = graph.value(node, "text", "text_g")
            if isinstance(text, str) and node.kind != "ConditioningZeroOut":
                draft.values[name] = text
                _clip_skip(graph, node, draft)
            if isinstance(text, str) or node.kind == "ConditioningZeroOut":
                break
        else:
            if role == "positive":
                draft.note("its prompt was not found; the empty one is taken")


def _clip_skip(graph: Graph, encoder: Node, draft: Draft) -> None:
    for node in graph.walk(encoder, "clip"):
        layer = node.inputs.get("stop_at_clip_layer", -1)
        if layer != -1:
            draft.leave_out("CLIPSetLastLayer", layer)


def _settings(graph: Graph, first: Node, draft: Draft) -> None:
    sampler = graph.sampler(first)
    draft.whole("seed", graph.value(sampler, "seed", "noise_seed"))
    draft.whole("steps", graph.value(sampler, "steps"))
    draft.number("scale", graph.value(sampler, "cfg"))
    draft.sampler(str(graph.value(sampler, "sampler_name")))
    for name in ("start_at_step", "add_noise", "return_with_leftover_noise"):
        if (value := graph.value(sampler, name)) not in ("enable", "disable"):
            draft.leave_out(name, value)


def _timesteps(graph: Graph, first: Node, draft: Draft) -> None:
    scheduler = str(graph.value(graph.sampler(first), "scheduler"))[:50]
    if scheduler == "ddim_uniform":
        draft.spacing_of_compvis()
    else:
        draft.note(f"scheduler {scheduler} is not here; the sampler's own timesteps are taken")


def _model(graph: Graph, first: Node, draft: Draft) -> None:
    for node in list(graph.walk(graph.sampler(first), "model"))[1:]:
        _expect(node, draft)
        on_text = graph.value(node, "strength_clip") if "clip" in node.inputs else 0.0
        draft.lora(graph.value(node, "lora_name"), graph.value(node, "strength_model"), on_text)
        model = graph.value(node, "ckpt_name", "unet_name")
        if isinstance(model, str):
            draft.model = file_name(model)


def _start(graph: Graph, first: Node, draft: Draft) -> int:
    """What the first pass starts from: an empty latent's size, or a picture. Returns the size of the batch."""
    batch, denoise = 1, graph.value(graph.sampler(first), "denoise")
    for node in list(graph.walk(first, "latent_image", "samples", "pixels", "image"))[1:]:
        _expect(node, draft)
        width, height, count = (graph.value(node, name) for name in ("width", "height", "batch_size"))
        if node.kind == "LoadImage":
            draft.start_from(file_name(str(graph.value(node, "image"))), denoise)
        elif type(width) is int and type(height) is int and node.kind.startswith("Empty"):
            draft.whole("width", width)
            draft.whole("height", height)
            batch = count if type(count) is int else 1
    if "width" not in draft.values and "init" not in draft.values:
        draft.note("its size was not found; 512x512 is taken")
    _fewer_steps(denoise, draft)
    return batch


def _fewer_steps(denoise: Any, draft: Draft) -> None:
    """ComfyUI runs as many steps as it is told: the last of a longer schedule."""
    steps = draft.values.get("steps", 0)
    if "init" in draft.values and isinstance(denoise, float) and 0 < denoise < 1 and steps < 1000 * denoise:
        draft.values["steps"] = longer = int(steps / denoise)
        draft.note(f"{longer} steps at strength {denoise:g} run as many as its {steps}")


def _second_pass(graph: Graph, way: list[Node], draft: Draft) -> None:
    """Upscaling, where that is what lies on the `way` from the second pass's sampler to the first's."""
    width = draft.values.get("width", 0)
    for node in way[1:]:
        factor, wanted = graph.value(node, "scale_by"), graph.value(node, "width")
        if type(wanted) is int and wanted < 2**20 and width:
            factor = wanted / width
        if isinstance(factor, (int, float)) and 1 < factor <= 8:
            draft.number("upscale", factor)
            draft.number("upscale_strength", graph.value(graph.sampler(way[0]), "denoise"))
            draft.values["upscale_in"] = "latents" if node.kind.startswith("Latent") else "pixels"
            draft.note("its second pass has settings and noise of its own; the first pass's are taken")
            return
    draft.note("its later passes are left out")


def _noise(batch: int, draft: Draft) -> None:
    draft.cpu_noise()
    if batch > 1:
        draft.values["seed_mode"] = "batch"
        draft.note(
            f"it is one of a batch of {batch} from one seed; the file does not say which, the first is taken"
        )


def _expect(node: Node, draft: Draft) -> None:
    if node.kind not in _EXPECTED:
        draft.note(f"left out: node {node.kind}")
