"""Nodes that condition: the texts of the first pass's prompts."""

from __future__ import annotations

from ldm.metadata.foreign.comfyui.graph import Node, as_link
from ldm.metadata.foreign.comfyui.nodes import TOWARDS_TEXT
from ldm.metadata.foreign.comfyui.passes import Passes
from ldm.metadata.foreign.comfyui.prompt import Prompt, parse_prompt
from ldm.metadata.infotext import file_name
from ldm.metadata.recipe import Draft
from ldm.prompts.editing import without_weight


def read_prompts(passes: Passes) -> list[Node]:
    """Reads both prompts; returns the nodes that encode them, the positive one first."""
    found: dict[str, Prompt] = {}
    encoders: list[Node] = []
    for role, name in (("positive", "prompt"), ("negative", "negative_prompt")):
        encoder = _encoder(passes, role)
        text = encoder and _text(passes, encoder, role)
        if encoder and isinstance(text, str):
            found[name] = parse_prompt(text)
            encoders.append(encoder)
        elif not (encoder and encoder.kind == "ConditioningZeroOut") and (
            role == "positive" or role in passes.sampler.inputs
        ):
            passes.draft.note(f"its {name.replace('_', ' ')} was not found; the empty one is used")
    _set_prompts(passes.draft, found)
    return encoders


def _set_prompts(draft: Draft, found: dict[str, Prompt]) -> None:
    """Sets the prompts by their fields, with notes on what acts by another rule here."""
    weighted = any(prompt.is_weighted for prompt in found.values())
    in_chunks = weighted or any(prompt.may_be_long for prompt in found.values())
    draft.values["prompt_syntax"] = "a1111" if in_chunks else "plain"
    for name, prompt in found.items():
        text = prompt.as_a1111() if in_chunks else prompt.text
        draft.values[name] = without_weight(text) if in_chunks and name == "prompt" else text
        for tag in prompt.tags:
            draft.note(f"left out: {tag}, which does nothing in ComfyUI")
        for embedding in prompt.embeddings:
            draft.note(f"it needs the textual inversion {embedding}")
    if weighted:
        draft.note("weights in its prompts act by another rule in ComfyUI; the web UI's is used")
    if any(prompt.is_long for prompt in found.values()):
        draft.note("prompts of more than 75 tokens are divided by another rule in ComfyUI")


def _encoder(passes: Passes, role: str) -> Node | None:
    """Returns the node that holds the text of a role, or sets its conditioning to zero."""
    graph, node, passed = passes.graph, passes.sampler, {passes.sampler.name}
    while True:
        names = (role, *TOWARDS_TEXT)
        source = graph.before(node, *names, "basic_pipe")
        if source is None or source.name in passed:
            return None
        if _is_pair(source) and "basic_pipe" not in node.inputs:
            role = "negative" if graph.output(node, *names) == 1 else "positive"
        passed.add(source.name)
        if not _read_control(passes, source):
            passes.expect(source)
        node = source
        if node.kind == "ConditioningZeroOut":
            passes.draft.note("ConditioningZeroOut is not here; the empty prompt is used")
            return node
        adds_to_another = graph.linked(node, *TOWARDS_TEXT) is not None
        if not adds_to_another and (_text(passes, node, role) is not None or "clip" in node.inputs):
            return node


def _read_control(passes: Passes, node: Node) -> bool:
    """Reads a node that applies a ControlNet, once for both roles; returns False for any other."""
    if not node.kind.startswith("ControlNetApply"):
        return False
    graph = passes.graph
    loader = graph.before(node, "control_net")
    name = None if loader is None else graph.text(loader, "control_net_name", "model_name")
    if not name:
        return False
    weight, start, end = (
        float(usual if (found := graph.number(node, key)) is None else found)
        for key, usual in (("strength", 1.0), ("start_percent", 0.0), ("end_percent", 1.0))
    )
    source = graph.before(node, "image")
    image = "" if source is None or source.kind != "LoadImage" else graph.text(source, "image") or ""
    found = file_name(name), file_name(image), weight, start, end
    if node.name in passes.controlled:
        return True
    passes.controlled[node.name] = None
    passes.draft.control(*found)
    passes.draft.values["control_resize"] = "fill"
    if source is not None and source.kind != "LoadImage":
        if "canny" in source.kind.lower():
            passes.draft.values["hint"] = "canny"
        passes.draft.note(f"its hint was made by node {source.kind}; give that image with --control")
    if (start, end) != (0.0, 1.0):
        passes.draft.note(
            "ComfyUI counts the start and end of a ControlNet in levels of noise; here they are steps"
        )
    return True


def _is_pair(node: Node) -> bool:
    """Returns whether both roles are linked inputs of a node, so that they are its outputs 0 and 1."""
    return all(as_link(node.inputs.get(role)) for role in ("positive", "negative"))


def _text(passes: Passes, node: Node, role: str) -> str | None:
    of_loader = (role,) if "ckpt_name" in node.inputs else ()
    return passes.graph.text(node, "text", "populated_text", "text_g", *of_loader, "prompt", "clip_l")
