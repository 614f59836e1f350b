"""Nodes before the first pass: an empty latent of a size and a batch, or an image with its mask."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import NamedTuple

from ldm.job import Init
from ldm.metadata.foreign.comfyui.graph import Node, as_whole
from ldm.metadata.foreign.comfyui.nodes import ENCODERS, MASKED, RESIZERS
from ldm.metadata.foreign.comfyui.passes import Passes
from ldm.metadata.foreign.comfyui.sizes import empty_size
from ldm.metadata.infotext import file_name

_MAX_BATCH, _MAX_SIDE = 4096, 2**16
_ANNOTATION = re.compile(r"\s*\[(input|output|temp)\]$")  # of a file's name: the folder that it is in


class Start(NamedTuple):
    """The start of the first pass: whether it is an image, and how many images are drawn in one batch."""

    from_image: bool
    batch: int


def read_start(passes: Passes) -> Start:
    """Reads the start of the first pass, and sets the job's size or the image that it starts from."""
    graph, draft = passes.graph, passes.draft
    batch, resized, name, from_image = 1, None, "", False
    for node in passes.before_first:
        passes.expect(node)
        if node.kind in ("LoadImage", "LoadImageOutput"):
            name, from_image = _image_name(passes, node), True
        elif node.kind in ENCODERS:
            from_image = True
        elif empty := empty_size(graph, node):
            draft.whole("width", empty[0])
            draft.whole("height", empty[1])
        elif node.kind == "ImageScale" and resized is None:
            resized = node
        elif node.kind in RESIZERS:
            draft.note(f"left out: node {node.kind} before the first pass")
        count = graph.number(node, "batch_size", "amount") if node.kind != "LatentFromBatch" else None
        batch *= int(count) if count is not None and 1 <= count <= _MAX_BATCH else 1
    if from_image:
        _read_image(passes, name, resized)
    elif "width" not in draft.values:
        _size_of_file(passes)
    return Start(from_image, batch)


def _size_of_file(passes: Passes) -> None:
    """Sets the file's size where it is the first pass's."""
    if passes.origin.size is not None and len(passes.samplers) == 1:
        width, height = passes.origin.size
        passes.draft.values |= {"width": width, "height": height}
        passes.draft.note("its size was not found; the file's is used")
    else:
        passes.draft.note("its size was not found; 512x512 is used")


def _read_image(passes: Passes, name: str, resized: Node | None) -> None:
    """Sets the image that the job starts from, with its mask; `resized` is the node that changes its size."""
    graph, draft = passes.graph, passes.draft
    draft.start_from(name, 1.0)
    init: Init | None = draft.values.get("init")
    if resized is not None:
        width, height = (as_whole(graph.number(resized, side)) for side in ("width", "height"))
        if (
            init is not None
            and type(width) is int
            and type(height) is int
            and 0 < min(width, height) < _MAX_SIDE
        ):
            resize = "fill" if resized.inputs.get("crop") == "center" else "stretch"
            init = replace(init, width=width, height=height, resize=resize)
        else:
            draft.note("left out: node ImageScale before the first pass")
    for node in passes.before_first:
        if node.kind in MASKED and (mask := graph.linked(node, "mask")):
            init = _with_mask(passes, mask, init)
    if init is not None:
        draft.values["init"] = init


def _with_mask(passes: Passes, mask: Node, init: Init | None) -> Init | None:
    """Returns `init` with a mask: the image's transparency, or another image.

    The repainted part has hard edges in ComfyUI.
    """
    graph, draft = passes.graph, passes.draft
    node, inverted = mask, False
    for node in graph.chain(mask, "mask", "image"):
        passes.expect(node)
        inverted ^= node.kind == "InvertMask"
    grow = next((grow for node in passes.chain if (grow := graph.number(node, "grow_mask_by"))), None)
    draft.leave_out("grow_mask_by", grow)
    draft.values["paste"] = False
    name = _image_name(passes, node)
    if init is None or not name or node.kind not in ("LoadImage", "LoadImageMask"):
        draft.note("it repaints a part of the image; its mask was not found")
        return init
    if node.kind == "LoadImage" or node.inputs.get("channel") == "alpha":
        if name == init.image:
            return replace(init, alpha_mask=True, invert_mask=inverted, mask_blur=0.0)
        draft.note(f"its mask is what is transparent in {name}, which is not read here")
        return init
    draft.note(f"its mask is the image {name}, which the file does not hold")
    return replace(init, mask=name, invert_mask=inverted, mask_blur=0.0)


def _image_name(passes: Passes, node: Node) -> str:
    """Returns the name, without folders, of the file that a node loads; may be empty."""
    return file_name(_ANNOTATION.sub("", passes.graph.text(node, "image") or ""))
