"""Nodes that load: the checkpoint, its LoRAs, the text encoder and the VAE."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ldm.metadata.foreign.comfyui.graph import Graph, Node, as_number, as_whole, widget_text
from ldm.metadata.foreign.comfyui.image_prompts import read_image_prompt
from ldm.metadata.foreign.comfyui.nodes import NO_FILE, TOWARDS_MODEL
from ldm.metadata.foreign.comfyui.passes import Passes
from ldm.metadata.infotext import file_name

_MAX_INPUTS, _MAX_WEIGHT = 200, 1e9
# names that loaders give to a LoRA and to its weights on the U-Net, on the text encoder and on both
_LORA = re.compile(r"lora(?:_name)?(_?[0-9]{1,2})?")
_ON_MODEL = (
    "strength_model", "lora_model_strength", "model_strength", "model_str", "model_weight", "strength",
)  # fmt: skip
_ON_TEXT = ("strength_clip", "lora_clip_strength", "clip_strength", "clip_str", "clip_weight")
_ON_BOTH = ("lora_wt", "lora_strength", "strength")

Number = int | float


class _Lora(NamedTuple):
    """A LoRA by name, with its weights on the U-Net (None if its node does not give it) and on the text encoder."""

    name: str
    weight: Number | None
    on_text: Number


def read_models(passes: Passes, encoders: Sequence[Node]) -> None:
    """Reads the checkpoint and its LoRAs, and notes text encoders and VAEs of other files.

    `encoders` are the nodes that encode the prompts, the positive one first.
    """
    graph, draft = passes.graph, passes.draft
    chains = [list(graph.chain(encoder, "clip", "basic_pipe", "pipe")) for encoder in encoders]
    loader = _read_checkpoint(passes, chains)
    if loader is None:
        draft.note("its model was not found")
    for chain in chains:
        _note_text_encoder(passes, chain, loader)
    if len(chains) > 1 and not _same_loras(*chains):
        draft.note("its prompts are encoded with different LoRAs; the positive prompt's are used for both")
    _note_vae(passes, loader)


def _read_checkpoint(passes: Passes, chains: Sequence[Sequence[Node]]) -> Node | None:
    """Reads the checkpoint and its LoRAs; returns the node that loads it."""
    graph, draft = passes.graph, passes.draft
    on_text = {node.name for node in chains[0]} if chains else None
    loader: Node | None = None
    loras: list[_Lora] = []
    for node in list(graph.chain(passes.sampler, *TOWARDS_MODEL))[1:]:
        if not read_image_prompt(passes, node):
            passes.expect(node)
        loras += reversed(_loras(passes, node, acts_on_text=on_text is None or node.name in on_text))
        name = graph.text(node, "ckpt_name", "unet_name", "base_ckpt_name")
        if name is not None:
            draft.model, loader = file_name(name), node
            break
    for lora in reversed(loras):
        draft.lora(*lora)
    return loader


def _same_loras(*chains: Sequence[Node]) -> bool:
    names = [[node.name for node in chain if any(map(_LORA.fullmatch, node.inputs))] for chain in chains]
    return all(found == names[0] for found in names)


def _note_text_encoder(passes: Passes, chain: Sequence[Node], loader: Node | None) -> None:
    """Notes the text encoder of a prompt if it is not the checkpoint's."""
    graph, draft = passes.graph, passes.draft
    for node in chain[1:]:
        passes.expect(node)
    for node in chain:
        layer = graph.number(node, "stop_at_clip_layer", "clip_skip")
        if layer not in (None, 0):
            draft.whole("clip_skip", as_whole(-layer))
        for name in ("token_normalization", "weight_interpretation"):
            if (value := widget_text(node.inputs.get(name))) not in (None, "none", "comfy"):
                draft.leave_out(name, value)
    end = chain[-1]
    if loader is not None and _differs(graph, end, loader) and len(chain) > 1:
        name = graph.text(end, "clip_name", "ckpt_name")
        draft.leave_out("text encoder", file_name(name) if name else f"of node {end.kind}")


def _note_vae(passes: Passes, loader: Node | None) -> None:
    """Notes a VAE that is not the checkpoint's."""
    graph, draft = passes.graph, passes.draft
    for node in passes.chain:
        chain = list(graph.chain(graph.linked(node, "vae", "optional_vae"), "vae", "basic_pipe"))
        if not chain:
            continue
        end = chain[-1]
        name = graph.text(end, "vae_name")
        if name is None and loader is not None and _differs(graph, end, loader):
            name = graph.text(end, "ckpt_name")
            draft.leave_out("VAE", file_name(name) if name else f"of node {end.kind}")
        elif name is not None and name.lower() not in NO_FILE:
            draft.leave_out("VAE", file_name(name))


def _differs(graph: Graph, node: Node, loader: Node) -> bool:
    """Returns whether a node loads from another file than the checkpoint's loader."""
    own = graph.text(node, "ckpt_name")
    return node.name != loader.name and (own is None or own != graph.text(loader, "ckpt_name"))


def _loras(passes: Passes, node: Node, *, acts_on_text: bool) -> list[_Lora]:
    """Returns a loader's LoRAs; those turned off are left out."""
    found: list[_Lora] = []
    for lora in _named_loras(passes, node):
        if lora.name.lower() in NO_FILE:
            continue
        name = file_name(lora.name)
        if lora.weight is None:
            passes.draft.note(f"left out: the LoRA {name}; node {node.kind} does not give its weight")
            continue
        on_text = lora.on_text if acts_on_text else 0
        if max(abs(lora.weight), abs(on_text)) >= _MAX_WEIGHT:
            passes.draft.note(f"left out: the LoRA {name}, since its weight is not a usable number")
        elif lora.weight or on_text:
            found.append(_Lora(lora.name, float(lora.weight), float(on_text)))
    return found


def _named_loras(passes: Passes, node: Node) -> Iterator[_Lora]:
    """Yields the LoRAs of a loader's stack, then its own."""
    graph = passes.graph
    for stack in reversed(list(graph.chain(graph.linked(node, "lora_stack"), "lora_stack"))):
        passes.expect(stack)
        yield from _own_loras(graph, stack, has_clip=True)
    yield from _own_loras(graph, node, has_clip="clip" in node.inputs or "ckpt_name" in node.inputs)


def _own_loras(graph: Graph, node: Node, *, has_clip: bool) -> Iterator[_Lora]:
    for key, value in list(node.inputs.items())[:_MAX_INPUTS]:
        if isinstance(value, dict) and isinstance(own := value.get("lora"), str):  # rgthree's rows
            weight = as_number(value.get("strength"))
            on_text = as_number(value.get("strengthTwo"))
            if value.get("on") is not False:
                yield _Lora(own, weight, (weight or 0) if on_text is None else on_text)
        elif match := _LORA.fullmatch(key):
            name = graph.text(node, key)
            if name is None or node.inputs.get(f"switch{match[1] or ''}") == "Off":
                continue
            weight, on_text, both = (
                graph.number(node, *(f"{name}{match[1] or ''}" for name in names))
                for names in (_ON_MODEL, _ON_TEXT, _ON_BOTH)
            )
            weight = both if weight is None else weight
            on_text = both if on_text is None else on_text
            yield _Lora(name, weight, on_text if on_text is not None and has_clip else 0)
