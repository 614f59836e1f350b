"""Reads ComfyUI's graph: nodes by id, each with a class and inputs that are values or links to nodes' outputs.

The graph is followed from the node that saved the image back to the initial latent or image. Each node
on the way is understood, or named in a note.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from ldm.job import Init
from ldm.metadata.foreign.comfyui_graph import Graph, Node, as_link, as_number, as_text, read_graph
from ldm.metadata.foreign.comfyui_prompt import Prompt, parse_prompt
from ldm.metadata.infotext import file_name
from ldm.metadata.recipe import UNKNOWN, Draft, Origin, Recipe
from ldm.util import InputError

_MAX_ENDS, _MAX_SIDE = 100, 2**20
_TOWARDS_START = (
    "images", "image", "samples", "latent_image", "pixels", "samples1", "samples_to", "image1", "destination",
    "input_image", "inpainted_image",
)  # fmt: skip
_TOWARDS_MODEL = ("model", "model1", "basic_pipe", "pipe")
_TOWARDS_TEXT = ("conditioning", "conditioning_1", "conditioning_to")
_SAMPLERS = {"KSampler", "KSamplerAdvanced", "SamplerCustom", "SamplerCustomAdvanced", "KSampler (Efficient)"}
_EXPECTED = _SAMPLERS | {
    "CLIPTextEncode", "ConditioningZeroOut", "EmptyLatentImage", "VAEDecode", "VAEEncode", "LoadImage",
    "CheckpointLoaderSimple", "CheckpointLoader|pysssss", "UNETLoader", "LoraLoader", "LoraLoaderModelOnly",
    "LoraLoader|pysssss", "Power Lora Loader (rgthree)", "Lora Loader Stack (rgthree)", "Efficient Loader",
    "CR Apply LoRA Stack", "CR LoRA Stack", "LoRA Stacker", "SaveImage", "PreviewImage", "Reroute", "LatentUpscale",
    "LatentUpscaleBy", "ImageScale", "ImageScaleBy", "RepeatLatentBatch", "LatentFromBatch", "ImageFromBatch",
    "VAEEncodeForInpaint", "SetLatentNoiseMask", "InpaintModelConditioning", "CLIPSetLastLayer", "ToBasicPipe",
    "FromBasicPipe", "ImpactSwitch", "Any Switch (rgthree)", "ComfySwitchNode", "LoadImageMask", "InvertMask",
    "LoadImageOutput", "RandomNoise", "DisableNoise", "BasicGuider", "CFGGuider", "BasicScheduler", "KarrasScheduler",
    "ExponentialScheduler", "PolyexponentialScheduler", "LaplaceScheduler", "VPScheduler", "BetaSamplingScheduler",
    "SDTurboScheduler", "AlignYourStepsScheduler", "GITSScheduler",
}  # fmt: skip
_RESIZERS = {"LatentUpscale", "LatentUpscaleBy", "ImageScale", "ImageScaleBy", "ImageUpscaleWithModel"}
_ENCODERS = {"VAEEncode", "VAEEncodeForInpaint", "VAEEncodeTiled", "InpaintModelConditioning"}
_KEEP_SIZE = _SAMPLERS | _ENCODERS | {
    "VAEDecode", "VAEDecodeTiled", "SaveImage", "PreviewImage", "Reroute", "RepeatLatentBatch", "LatentFromBatch",
    "ImageFromBatch", "SetLatentNoiseMask", "ImageSharpen", "ImageBlur",
}  # fmt: skip
_MASKED = {"VAEEncodeForInpaint", "SetLatentNoiseMask", "InpaintModelConditioning"}
_NOTHING = {"", "none", "[none]", "baked vae"}  # file names that mean "no file"
_ANNOTATION = re.compile(r"\s*\[(input|output|temp)\]$")
# Names that loaders give to a LoRA's weights, on the U-Net and on the text encoder.
_LORA = re.compile(r"lora(?:_name)?(_?[0-9]{1,2})?")
_ON_MODEL = (
    "strength_model",
    "lora_model_strength",
    "model_strength",
    "model_str",
    "model_weight",
    "strength",
)
_ON_TEXT = ("strength_clip", "lora_clip_strength", "clip_strength", "clip_str", "clip_weight")
_ON_BOTH = ("lora_wt", "lora_strength", "strength")

Size = tuple[int, int]


def read(text: str, origin: Origin = UNKNOWN) -> Recipe:
    """Reads the recipe of an image with a graph in ComfyUI's API form."""
    graph = read_graph(text)
    end = _end(graph, origin)
    return _Reader(Graph(graph.nodes), end, origin).recipe()


class _End(NamedTuple):
    """A node that may have saved the image, the nodes from there to the start, and the resulting image size."""

    way: tuple[Node, ...]
    size: Size | None
    rank: tuple[int, ...]


def _end(graph: Graph, origin: Origin) -> _End:
    """Finds the end of the graph that made the file: by its size, saved rather than previewed, and by its name."""
    values = (value for node in graph.nodes.values() for value in node.inputs.values())
    used = {link[0] for value in values if (link := as_link(value))}
    ends = [
        node for node in graph.nodes.values() if "images" in node.inputs or re.search("save", node.kind, re.I)
    ]
    samplers = [node for node in graph.nodes.values() if graph.samples(node)]
    found = []
    for end in ends[:_MAX_ENDS] or samplers[:1]:
        way = tuple(graph.walk(end, *_TOWARDS_START))
        if any(map(graph.samples, way)):
            size = _size(graph, way)
            found.append(_End(way, size, _rank(end, size, end.name in used, origin)))
    if not found and samplers:
        way = tuple(graph.walk(samplers[0], *_TOWARDS_START))
        found.append(_End(way, _size(graph, way), ()))
    if not found:
        kinds = sorted({node.kind for node in graph.nodes.values() if "ampler" in node.kind})
        raise InputError(
            f"its graph has no sampler that is known here{': it has ' * bool(kinds)}{', '.join(kinds[:5])}"
        )
    return min(found, key=lambda end: end.rank)


def _rank(end: Node, size: Size | None, goes_on: bool, origin: Origin) -> tuple[int, ...]:
    prefix = file_name(as_text(end.inputs.get("filename_prefix")) or "").partition("%")[0]
    return (
        1 if size is None or origin.size is None else 0 if size == origin.size else 2,
        1 if goes_on else 0,
        0 if re.search("save", end.kind, re.I) else 1,
        0 if prefix and origin.name.startswith(prefix) else 1,
    )


def _size(graph: Graph, way: Sequence[Node], size: Size | None = None) -> Size | None:
    """Returns the output size of the nodes from an end to a start of `size`; None if it is not determined."""
    for node in reversed(way):
        if empty := _empty(graph, node):
            size = empty
        elif node.kind in _RESIZERS:
            size = _resized(graph, node, size) if size and max(size) < _MAX_SIDE else None
        elif node.kind not in _KEEP_SIZE and not graph.samples(node):
            size = None
    return size


def _empty(graph: Graph, node: Node) -> Size | None:
    """Returns the size in pixels of the empty latent that a node makes."""
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


class _Reader:
    """Collects a recipe on the way from the end of a graph to its start."""

    def __init__(self, graph: Graph, end: _End, origin: Origin) -> None:
        self.graph, self.way, self.size, self.origin = graph, end.way, end.size, origin
        places = [i for i, node in enumerate(end.way) if graph.samples(node)]
        self.last, self.first = places[0], places[-1]
        self.passes = [graph.sampler(end.way[i]) for i in places]
        self.sampler = self.passes[-1]
        self.second = end.way[places[-2] : places[-1]] if len(places) > 1 else ()
        self.draft = Draft("ComfyUI")

    def recipe(self) -> Recipe:
        """Returns the recipe of the first pass, a second pass as upscaling, and notes on everything else."""
        draft = self.draft
        self._settings()
        encoders = self._prompts()
        loader = self._model(encoders)
        self._vae(loader)
        self._start()
        if self.second:
            self._second_pass()
        if len(self.passes) > 2:
            draft.note(f"{len(self.passes)} passes; at most two are made here")
        self._finish()
        for kind in self.graph.foreign:
            draft.note(f"a value comes from node {kind}, which is not known here")
        for link in self.graph.lost:
            draft.note(f"{link}, which its graph lacks")
        return draft.finish()

    def _expect(self, node: Node) -> None:
        if node.kind not in _EXPECTED:
            self.draft.note(f"left out: node {node.kind}")

    # --- the first pass's settings

    def _settings(self) -> None:
        graph, sampler, draft = self.graph, self.sampler, self.draft
        if sampler.kind not in _SAMPLERS:
            draft.note(f"its sampler is the node {sampler.kind}, which is read as a KSampler")
        draft.whole("seed", _whole(graph.number(sampler, "seed", "noise_seed")))
        draft.whole("steps", _whole(graph.number(sampler, "steps")))
        draft.number("scale", graph.number(sampler, "cfg"))
        name = graph.text(sampler, "sampler_name") or ""
        draft.sampler(name)
        scheduler = (graph.text(sampler, "scheduler") or "(none named)")[:50]
        if scheduler == "ddim_uniform":
            draft.spacing_of_compvis()
        else:
            draft.note(f"scheduler {scheduler} is not here; the sampler's own timesteps are used")
        for name in ("noise", "guider", "sigmas"):
            for node in graph.walk(graph.linked(sampler, name), name):
                self._expect(node)
        if script := graph.linked(sampler, "script"):
            self._expect(script)

    # --- prompts

    def _prompts(self) -> list[Node]:
        """Reads both prompts; returns the nodes that encode them, the positive one first."""
        found: dict[str, Prompt] = {}
        encoders = []
        for role, name in (("positive", "prompt"), ("negative", "negative_prompt")):
            encoder = self._encoder(role)
            text = encoder and self._text(encoder, role)
            if encoder and isinstance(text, str):
                found[name] = parse_prompt(text)
                encoders.append(encoder)
            elif not (encoder and encoder.kind == "ConditioningZeroOut") and (
                role == "positive" or role in self.sampler.inputs
            ):
                self.draft.note(f"its {name.replace('_', ' ')} was not found; the empty one is used")
        weighted = any(prompt.is_weighted for prompt in found.values())
        in_chunks = weighted or any(prompt.may_be_long for prompt in found.values())
        self.draft.values["prompt_syntax"] = "a1111" if in_chunks else "plain"
        for name, prompt in found.items():
            self.draft.values[name] = prompt.as_a1111() if in_chunks else prompt.text
            for tag in prompt.tags:
                self.draft.note(f"left out: {tag}, which does nothing in ComfyUI")
            for embedding in prompt.embeddings:
                self.draft.note(f"it needs the textual inversion {embedding}")
        if weighted:
            self.draft.note("weights in its prompts act by another rule in ComfyUI; the web UI's is used")
        if any(prompt.is_long for prompt in found.values()):
            self.draft.note("prompts of more than 75 tokens are divided by another rule in ComfyUI")
        return encoders

    def _encoder(self, role: str) -> Node | None:
        """Returns the node that holds the text of a role, or sets its conditioning to zero."""
        node, passed = self.sampler, {self.sampler.name}
        while True:
            names = (role, *_TOWARDS_TEXT)
            source = self.graph.before(node, *names, "basic_pipe")
            if source is None or source.name in passed:
                return None
            if self._is_pair(source) and "basic_pipe" not in node.inputs:
                role = "negative" if self.graph.output(node, *names) == 1 else "positive"
            passed.add(source.name)
            self._expect(source)
            node = source
            if node.kind == "ConditioningZeroOut":
                self.draft.note("ConditioningZeroOut is not here; the empty prompt is used")
                return node
            adds_to_another = self.graph.linked(node, *_TOWARDS_TEXT) is not None
            if not adds_to_another and (self._text(node, role) is not None or "clip" in node.inputs):
                return node

    @staticmethod
    def _is_pair(node: Node) -> bool:
        """Returns whether both roles are linked inputs of a node, so that they are its outputs 0 and 1."""
        return all(as_link(node.inputs.get(role)) for role in ("positive", "negative"))

    def _text(self, node: Node, role: str) -> str | None:
        of_loader = (role,) if "ckpt_name" in node.inputs else ()
        return self.graph.text(node, "text", "populated_text", "text_g", *of_loader, "prompt", "clip_l")

    # --- models

    def _model(self, encoders: Sequence[Node]) -> Node | None:
        """Reads the checkpoint and its LoRAs; returns the node that loads it."""
        graph, draft = self.graph, self.draft
        chains = [list(graph.walk(encoder, "clip", "basic_pipe", "pipe")) for encoder in encoders]
        on_text = [{node.name for node in chain} for chain in chains]
        loader: Node | None = None
        loras: list[tuple[str, float, float]] = []
        for node in list(graph.walk(self.sampler, *_TOWARDS_MODEL))[1:]:
            self._expect(node)
            loras += reversed(self._loras(node, acts_on_text=not chains or node.name in on_text[0]))
            name = graph.text(node, "ckpt_name", "unet_name", "base_ckpt_name")
            if name is not None:
                draft.model, loader = file_name(name), node
                break
        for name, weight, text_weight in reversed(loras):
            draft.lora(name, weight, text_weight)
        if loader is None:
            draft.note("its model was not found")
        for chain in chains:
            self._clip(chain, loader)
        if len(chains) > 1 and not self._same_loras(*chains):
            draft.note(
                "its prompts are encoded with different LoRAs; the positive prompt's are used for both"
            )
        return loader

    def _same_loras(self, *chains: Sequence[Node]) -> bool:
        names = [[node.name for node in chain if any(map(_LORA.fullmatch, node.inputs))] for chain in chains]
        return all(found == names[0] for found in names)

    def _clip(self, chain: Sequence[Node], loader: Node | None) -> None:
        """Notes the text encoder of a prompt if it is not the checkpoint's."""
        for node in chain[1:]:
            self._expect(node)
        for node in chain:
            layer = self.graph.number(node, "stop_at_clip_layer", "clip_skip")
            if layer not in (None, -1, 0):
                self.draft.leave_out("CLIPSetLastLayer", layer)
            for name in ("token_normalization", "weight_interpretation"):
                if (value := as_text(node.inputs.get(name))) not in (None, "none", "comfy"):
                    self.draft.leave_out(name, value)
        end = chain[-1]
        if loader is not None and self._differs(end, loader) and len(chain) > 1:
            name = self.graph.text(end, "clip_name", "ckpt_name")
            self.draft.leave_out("text encoder", file_name(name) if name else f"of node {end.kind}")

    def _differs(self, node: Node, loader: Node) -> bool:
        """Returns whether a node loads from another file than the checkpoint's loader."""
        own = self.graph.text(node, "ckpt_name")
        return node.name != loader.name and (own is None or own != self.graph.text(loader, "ckpt_name"))

    def _vae(self, loader: Node | None) -> None:
        """Notes a VAE that is not the checkpoint's."""
        for node in self.way:
            for end in list(
                self.graph.walk(self.graph.linked(node, "vae", "optional_vae"), "vae", "basic_pipe")
            )[-1:]:
                name = self.graph.text(end, "vae_name")
                if name is None and loader is not None and self._differs(end, loader):
                    name = self.graph.text(end, "ckpt_name")
                    self.draft.leave_out("VAE", file_name(name) if name else f"of node {end.kind}")
                elif name is not None and name.lower() not in _NOTHING:
                    self.draft.leave_out("VAE", file_name(name))

    def _loras(self, node: Node, acts_on_text: bool) -> list[tuple[str, float, float]]:
        """Returns a loader's LoRAs with their weights on U-Net and text encoder; those turned off are left out."""
        found = []
        for name, weight, on_text in self._named_loras(node):
            if name.lower() in _NOTHING:
                continue
            if weight is None:
                self.draft.note(
                    f"left out: the LoRA {file_name(name)}; node {node.kind} does not say its weight"
                )
                continue
            text_weight = on_text if acts_on_text else 0.0
            if abs(weight) >= 1e9 or abs(text_weight) >= 1e9:
                self.draft.note(
                    f"left out: the LoRA {file_name(name)}, since its weight is not a usable number"
                )
            elif weight or text_weight:
                found.append((name, float(weight), float(text_weight)))
        return found

    def _named_loras(self, node: Node) -> Iterator[tuple[str, int | float | None, int | float]]:
        """Yields names of LoRAs, weights on the U-Net (None if not given) and on the text encoder."""
        for stack in reversed(list(self.graph.walk(self.graph.linked(node, "lora_stack"), "lora_stack"))):
            self._expect(stack)
            yield from self._own_loras(stack, True)
        yield from self._own_loras(node, "clip" in node.inputs or "ckpt_name" in node.inputs)

    def _own_loras(self, node: Node, has_clip: bool) -> Iterator[tuple[str, int | float | None, int | float]]:
        for key, value in list(node.inputs.items())[:200]:
            if isinstance(value, dict) and isinstance(value.get("lora"), str):  # rgthree's rows
                weight = as_number(value.get("strength"))
                on_text = as_number(value.get("strengthTwo"))
                if value.get("on") is not False:
                    yield value["lora"], weight, (weight or 0) if on_text is None else on_text
            elif match := _LORA.fullmatch(key):
                name = self.graph.text(node, key)
                if name is None or node.inputs.get(f"switch{match[1] or ''}") == "Off":
                    continue
                weight, on_text, both = (
                    self.graph.number(node, *(f"{name}{match[1] or ''}" for name in names))
                    for names in (_ON_MODEL, _ON_TEXT, _ON_BOTH)
                )
                weight = both if weight is None else weight
                on_text = both if on_text is None else on_text
                yield name, weight, on_text if on_text is not None and has_clip else 0

    # --- what the first pass starts from

    def _start(self) -> None:
        """Reads the start, an empty latent of a size and a batch or an image, and how much of the schedule runs."""
        graph, draft = self.graph, self.draft
        nodes = self.way[self.first + 1 :]
        batch, resized, name = 1, None, ""
        from_image = False
        for node in nodes:
            self._expect(node)
            if node.kind in ("LoadImage", "LoadImageOutput"):
                name = file_name(_ANNOTATION.sub("", graph.text(node, "image") or ""))
                from_image = True
            elif node.kind in _ENCODERS:
                from_image = True
            elif empty := _empty(graph, node):
                draft.whole("width", empty[0])
                draft.whole("height", empty[1])
            elif node.kind == "ImageScale" and resized is None:
                resized = node
            elif node.kind in _RESIZERS:
                draft.note(f"left out: node {node.kind} before the first pass")
            count = graph.number(node, "batch_size", "amount") if node.kind != "LatentFromBatch" else None
            batch *= int(count) if count is not None and 1 <= count <= 4096 else 1
        if from_image:
            self._init(name, resized)
        elif "width" not in draft.values:
            self._size_of_file()
        self._part_of_the_schedule(from_image)
        self._noise(batch)

    def _size_of_file(self) -> None:
        if self.origin.size is not None and not self.second:
            self.draft.values |= {"width": self.origin.size[0], "height": self.origin.size[1]}
            self.draft.note("its size was not found; the file's is used")
        else:
            self.draft.note("its size was not found; 512x512 is used")

    def _init(self, name: str, resized: Node | None) -> None:
        graph, draft = self.graph, self.draft
        draft.start_from(name, 1.0)
        init = draft.values.get("init")
        if resized is not None:
            width, height = (_whole(graph.number(resized, side)) for side in ("width", "height"))
            if (
                isinstance(init, Init)
                and type(width) is int
                and type(height) is int
                and 0 < min(width, height) < 2**16
            ):
                resize = "fill" if resized.inputs.get("crop") == "center" else "stretch"
                init = replace(init, width=width, height=height, resize=resize)
            else:
                draft.note("left out: node ImageScale before the first pass")
        for node in self.way[self.first + 1 :]:
            if node.kind in _MASKED and (mask := graph.linked(node, "mask")):
                init = self._mask(mask, init)
        if isinstance(init, Init):
            draft.values["init"] = init

    def _mask(self, mask: Node, init: Init | None) -> Init | None:
        """Reads a mask, the image's transparency or another image; the repainted part has hard edges in ComfyUI."""
        inverted, draft = False, self.draft
        node = mask
        for node in self.graph.walk(mask, "mask", "image"):
            self._expect(node)
            inverted ^= node.kind == "InvertMask"
        grow = next((g for n in self.way if (g := self.graph.number(n, "grow_mask_by"))), None)
        draft.leave_out("grow_mask_by", grow)
        draft.values["paste"] = False
        name = file_name(_ANNOTATION.sub("", self.graph.text(node, "image") or ""))
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

    def _part_of_the_schedule(self, from_image: bool) -> None:
        """Sets the strength. ComfyUI runs its number of steps as the last ones of a longer schedule."""
        graph, draft, sampler = self.graph, self.draft, self.sampler
        steps = draft.values.get("steps", 50)
        start, end = (graph.number(sampler, name) for name in ("start_at_step", "end_at_step"))
        denoise = graph.number(sampler, "denoise")
        if start is not None and 0 < start < steps:
            denoise = (steps - start) / steps
        elif start is not None and start >= steps:
            draft.note(f"it starts at step {start} of {steps}, so nothing is drawn; all steps are run here")
        if "denoise" in sampler.inputs and (denoise is None or not 0 < denoise <= 1):
            draft.note("its denoise is not between 0 and 1; 1 is used")
            denoise = None
        if from_image:
            draft.number("strength", 1.0 if denoise is None else denoise)
            if start is None and denoise is not None and denoise < 1 and steps < 1000 * denoise:
                draft.values["steps"] = longer = int(steps / denoise)
                draft.note(f"{longer} steps at strength {denoise:g} run as many as its {steps}")
        elif denoise is not None and denoise < 1:
            draft.note(
                f"it starts part-way, at denoise {denoise:g}, from an empty image; all steps are run here"
            )
        if end is not None and end < steps:
            leftover = " with noise left over" * (
                sampler.inputs.get("return_with_leftover_noise") == "enable"
            )
            draft.note(f"it ends at step {end} of {steps}{leftover}; all steps are run here")
        noise = sampler.inputs.get("add_noise")
        beside = graph.linked(sampler, "noise")
        if noise in ("disable", False) or (beside is not None and beside.kind == "DisableNoise"):
            draft.note("its first pass adds no noise; here it does")

    def _noise(self, batch: int) -> None:
        """Reads the noise: one stream for the whole batch, of which a node may select one entry.

        Nodes of the Inspire Pack can draw on the GPU, and with a seed for each image, which counts up.
        """
        draft, graph = self.draft, self.graph
        entry = None
        for node in self.way:
            if node.kind in ("LatentFromBatch", "ImageFromBatch") and graph.number(node, "length") == 1:
                entry = graph.number(node, "batch_index")
        if graph.text(self.sampler, "batch_seed_mode") == "incremental":
            if entry is not None and 0 <= entry < batch and "seed" in draft.values:
                draft.values["seed"] += int(entry)
            elif batch > 1:
                draft.note(f"it is one of a batch of {batch}; the file does not say which, the first is used")
        elif entry is not None and 0 <= entry < batch:
            draft.values |= {"seed_mode": "batch", "batch_index": int(entry)}
        elif batch > 1:
            draft.values["seed_mode"] = "batch"
            draft.note(
                f"it is one of a batch of {batch} from one seed; the file does not say which, the first is used"
            )
        if (graph.text(self.sampler, "noise_mode") or "").startswith("GPU"):
            draft.gpu_noise()
        else:
            draft.cpu_noise()

    # --- what comes after the first pass

    def _second_pass(self) -> None:
        """Reads upscaling, if nothing else is between the second pass's sampler and the first's."""
        graph, draft = self.graph, self.draft
        between = self.second[1:]
        for node in between:
            self._expect(node)
        resizers = [node for node in reversed(between) if node.kind in _RESIZERS]
        first = (draft.values.get("width", 0), draft.values.get("height", 0))
        second = _size(graph, resizers[::-1], first if all(first) else None)
        if resizers and second is None and len(self.passes) == 2:
            second = self.origin.size
        denoise = graph.number(self.passes[-2], "denoise")
        if not (resizers and second and first[0] and 1 < second[0] / first[0] <= 8) or denoise is None:
            draft.note("its later passes are left out")
            return
        draft.number("upscale", second[0] / first[0])
        draft.number("upscale_strength", denoise)
        if abs(second[1] / first[1] - second[0] / first[0]) > 8 / first[1]:
            draft.note(
                f"its second pass is {second[0]}x{second[1]}, of other proportions; its width's factor is used"
            )
        in_latents = all(node.kind.startswith("Latent") for node in resizers)
        draft.values["upscale_in"] = "latents" if in_latents else "pixels"
        if not in_latents and any(node.kind == "ImageUpscaleWithModel" for node in resizers):
            draft.note("an upscaling model is not here; Lanczos is used")
        draft.note("its second pass has settings and noise of its own; the first pass's are used")

    def _finish(self) -> None:
        """Notes what is done after the last pass, and a size that is not the file's."""
        for node in self.way[: self.last]:
            self._expect(node)
            if node.kind in _RESIZERS:
                self.draft.note(f"left out: node {node.kind} after the last pass")
        if self.size and self.origin.size and self.size != self.origin.size:
            self.draft.note(
                f"its graph makes {self.size[0]}x{self.size[1]} pixels; the file has "
                f"{self.origin.size[0]}x{self.origin.size[1]}"
            )


def _whole(value: Any) -> Any:
    """Returns a number without its fraction, as ComfyUI reads integers."""
    return int(value) if isinstance(value, float) and abs(value) < 2**64 else value
