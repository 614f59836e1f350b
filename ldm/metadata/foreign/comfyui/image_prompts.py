"""Nodes of the package ComfyUI_IPAdapter_plus: images that act on the model as prompts."""

from __future__ import annotations

from ldm.metadata.foreign.comfyui.graph import Node, widget_text
from ldm.metadata.foreign.comfyui.passes import Passes
from ldm.metadata.infotext import file_name

_NODES = {"IPAdapter", "IPAdapterAdvanced", "IPAdapterApply"}
# the files that presets of the unified loader choose, by the start of a preset's name
_PRESETS = {
    "light": "ip-adapter_sd15_light_v11",
    "standard": "ip-adapter_sd15",
    "vit-g": "ip-adapter_sd15_vit-G",
    "plus (": "ip-adapter-plus_sd15",
    "plus face": "ip-adapter-plus-face_sd15",
    "full face": "ip-adapter-full-face_sd15",
}
_USUAL = {"weight_type": ("linear", "standard", "original"), "embeds_scaling": ("V only",)}


def read_image_prompt(passes: Passes, node: Node) -> bool:
    """Reads a node that applies an IP-Adapter to the model; returns False for any other node, or without a file."""
    graph, draft = passes.graph, passes.draft
    loader = graph.before(node, "ipadapter") if node.kind in _NODES else None
    name = (
        ""
        if loader is None
        else graph.text(loader, "ipadapter_file") or _preset(graph.text(loader, "preset"))
    )
    if not name:
        return False
    weight, start, end = (
        float(usual if (found := graph.number(node, key)) is None else found)
        for key, usual in (("weight", 1.0), ("start_at", 0.0), ("end_at", 1.0))
    )
    source = graph.before(node, "image")
    loaded = source is not None and source.kind == "LoadImage"
    image = (graph.text(source, "image") or "") if source is not None and loaded else ""
    draft.control(name, image, weight, start, end, "the IP-Adapter {} and its image {}")
    if source is not None and not loaded:
        draft.note(
            f"the image of its IP-Adapter was made by node {source.kind}; give that image with --control"
        )
    for key, usual in _USUAL.items():
        if (value := widget_text(node.inputs.get(key))) not in (None, *usual):
            draft.leave_out(f"{key} of its IP-Adapter:", value)
    for key in ("attn_mask", "image_negative"):
        if graph.linked(node, key) is not None:
            draft.note(f"left out: {key} of its IP-Adapter")
    encoder = graph.linked(node, "clip_vision")
    if encoder is not None and (clip := graph.text(encoder, "clip_name")):
        draft.note(
            f"its IP-Adapter has the image encoder {file_name(clip)}; here it is the folder image_encoder"
        )
    if (start, end) != (0.0, 1.0):
        draft.note(
            "ComfyUI counts the start and end of an IP-Adapter in levels of noise; here they are steps"
        )
    return True


def _preset(text: str | None) -> str:
    """The name of the file that a preset of the unified loader chooses; empty for one of faces and an unknown one."""
    lower = (text or "").lower()
    return next((name for start, name in _PRESETS.items() if lower.startswith(start)), "")
