"""ComfyUI's graphs are read as ComfyUI would run them; what is not supported is named."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ldm.job import Init, Job
from ldm.metadata.foreign import comfyui
from ldm.metadata.foreign.comfyui.prompt import parse_prompt
from ldm.metadata.read import Recipe, read_job
from ldm.metadata.recipe import UNKNOWN, Origin
from ldm.metadata.record import read_record, record
from ldm.models.diffusion.noise import noise_source
from ldm.prompts.weights import parse_weights
from ldm.util import InputError
from tests.support.metadata import noted, png

Nodes = dict[str, dict[str, Any]]

SAMPLER = {
    "seed": 5, "steps": 10, "cfg": 7.0, "sampler_name": "ddim", "scheduler": "ddim_uniform", "denoise": 1.0,
    "model": ["4", 0], "positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0],
}  # fmt: skip
GRAPH = {
    "3": ("KSampler", SAMPLER),
    "4": ("CheckpointLoaderSimple", {"ckpt_name": "m.safetensors"}),
    "5": ("EmptyLatentImage", {"width": 64, "height": 64, "batch_size": 1}),
    "6": ("CLIPTextEncode", {"text": "a cat", "clip": ["4", 1]}),
    "7": ("CLIPTextEncode", {"text": "blurry", "clip": ["4", 1]}),
    "8": ("VAEDecode", {"samples": ["3", 0], "vae": ["4", 2]}),
    "9": ("SaveImage", {"filename_prefix": "ComfyUI", "images": ["8", 0]}),
}
PLAIN = Job("a cat", "blurry", seed=5, width=64, height=64, steps=10, scale=7.0, rng="cpu")
IMAGE = {
    "70": ("VAEEncode", {"pixels": ["71", 0], "vae": ["4", 2]}),
    "71": ("LoadImage", {"image": "photo.png"}),
}
HIRES = {
    "10": ("LatentUpscaleBy", {"samples": ["3", 0], "scale_by": 2.0, "upscale_method": "bilinear"}),
    "11": ("KSampler", SAMPLER | {"denoise": 0.5, "latent_image": ["10", 0]}),
    "12": ("VAEDecode", {"samples": ["11", 0], "vae": ["4", 2]}),
    "13": ("SaveImage", {"filename_prefix": "hires/big", "images": ["12", 0]}),
}


def nodes(*more: dict[str, tuple[str, dict[str, Any]]], **inputs: dict[str, Any]) -> Nodes:
    """The first workflow with further nodes, and with inputs of nodes (`_3` is node 3) changed."""
    found = dict(GRAPH)
    for part in more:
        found |= part
    return {
        key: {"class_type": kind, "inputs": copy.deepcopy(own) | inputs.get(f"_{key}", {})}
        for key, (kind, own) in found.items()
    }


def read(graph: object, origin: Origin = UNKNOWN) -> Recipe:
    return comfyui.read(json.dumps(graph), origin)


def test_the_first_workflow_needs_no_notes() -> None:
    assert read(nodes(), Origin("ComfyUI_00001_.png", (64, 64))) == Recipe(PLAIN, "ComfyUI", "m.safetensors")


# --- which end of the graph made the file


@pytest.mark.parametrize("first", ["SaveImage", "PreviewImage"])
@pytest.mark.parametrize(("size", "upscale"), [((64, 64), 1.0), ((128, 128), 2.0)])
def test_the_size_of_the_file_tells_its_end(first: str, size: tuple[int, int], upscale: float) -> None:
    graph = nodes(HIRES)
    graph["9"]["class_type"] = first
    recipe = read(graph, Origin("x.png", size))
    assert (recipe.job.upscale, noted(recipe, "pixels")) == (upscale, False)


def test_what_is_saved_is_preferred_to_what_is_shown() -> None:
    graph = nodes(HIRES)
    graph["9"]["class_type"] = "PreviewImage"
    assert read(graph).job.upscale == 2


@pytest.mark.parametrize(("name", "seed"), [("ComfyUI_00002_.png", 5), ("other_00001_.png", 6)])
def test_the_name_of_the_file_tells_its_end(name: str, seed: int) -> None:
    other = {
        "11": ("KSampler", SAMPLER | {"seed": 6}),
        "12": ("VAEDecode", {"samples": ["11", 0], "vae": ["4", 2]}),
        "13": ("SaveImage", {"filename_prefix": "sub/other", "images": ["12", 0]}),
    }
    assert read(nodes(other), Origin(name, (64, 64))).job.seed == seed


@pytest.mark.parametrize("resized", [{}, {"_10": {"scale_by": None, "width": 64, "height": 0}}])
def test_an_empty_latent_of_no_height_has_no_size(resized: dict[str, Any]) -> None:
    recipe = read(nodes(HIRES, _5={"height": 7}, **resized))
    assert (recipe.job.upscale, recipe.job.height) == (1.0, 512)
    assert noted(recipe, "height cannot be 0")


def test_a_file_of_another_size_than_its_graph_makes_is_named() -> None:
    assert noted(read(nodes(), Origin("x.png", (32, 32))), "64x64", "32x32")


def test_the_file_itself_is_looked_at(tmp_path: Path) -> None:
    graph = nodes(HIRES)
    path = png(tmp_path / "x.png", prompt=json.dumps(graph))
    assert read_job(path).job.upscale == 1 and noted(read_job(path), "64x64", "8x8")
    with Image.open(path) as image:
        assert image.size == (8, 8)


# --- prompts


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("saber \\(fate\\)", [("saber (fate)", 1.0)]),
        ("(a)", [("a", 1.1)]),
        ("((a))", [("a", 1.1 * 1.1)]),
        ("(a:1.3)", [("a", 1.3)]),
        ("((a:1.3):0.5)", [("a", 1.3)]),  # absolute, whatever is around it
        ("(a (b:1.3) c:0.5)", [("a ", 0.5), ("b", 1.3), (" c", 0.5)]),
        ("(a:x)", [("a:x", 1.1)]),
        ("(a (b)", [("a ", 1.1), ("(b", 1.1)]),  # one is not closed
        ("(a b", [("(a b", 1.0)]),
        ("a) (b:2)", [("a) (b:2)", 1.0)]),
        ("[a] {b|c} BREAK", [("[a] {b|c} BREAK", 1.0)]),
        ("(a:nan)", [("a:nan", 1.1)]),
    ],
)
def test_weights_by_the_rule_of_comfyui(prompt: str, parts: list[tuple[str, float]]) -> None:
    assert list(parse_prompt(prompt).parts) == [(text, pytest.approx(weight)) for text, weight in parts]


@pytest.mark.parametrize(
    "prompt", ["a (b:1.3) \\(c\\) [d:e:0.5] f\\g AND h BREAK i) (j", "((a:0.25) [x|y]:2) 16:9"]
)
def test_the_web_ui_s_syntax_says_the_same(prompt: str) -> None:
    read_here = parse_prompt(prompt)
    (section,) = parse_weights(read_here.as_a1111())
    assert "".join(text for text, _ in section) == read_here.text.replace("BREAK", "break").replace(
        "AND", "and"
    )
    assert {round(w, 6) for t, w in section if t} == {round(w, 6) for t, w in read_here.parts if t}


def test_a_number_at_the_end_is_text() -> None:
    """Where the web UI reads the weight of a prompt."""
    recipe = read(nodes(_6={"text": "(a cat:1.2), 16:9"}, _7={"text": "x:2"}))
    assert (recipe.job.prompt, recipe.job.negative_prompt) == ("(a cat:1.2), 16:9:1", "x:2")


def test_weights_are_kept_and_noted() -> None:
    recipe = read(nodes(_7={"text": "(blurry:1.4), [x]"}))
    assert (recipe.job.prompt, recipe.job.negative_prompt) == ("a cat", "(blurry:1.4), \\[x\\]")
    assert recipe.job.prompt_syntax == "a1111" and noted(recipe, "weights", "another rule")


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("embedding:easyneg, blurry", "easyneg, blurry"),
        ("embedding:easyneg.pt", "easyneg"),
        ("embedding:sub/easyneg.safetensors ugly", "easyneg ugly"),
        ("a,\nembedding:sub\\easyneg", "a,\neasyneg"),
    ],
)
@pytest.mark.parametrize("role", ["prompt", "negative_prompt"])
def test_embeddings_are_named(text: str, plain: str, role: str) -> None:
    recipe = read(nodes(**{"_6" if role == "prompt" else "_7": {"text": text}}))
    assert getattr(recipe.job, role) == plain and noted(recipe, "textual inversion easyneg")


def test_an_embedding_with_a_weight() -> None:
    recipe = read(nodes(_7={"text": "(embedding:easyneg:1.2), x"}))
    assert recipe.job.negative_prompt == "(easyneg:1.2), x" and noted(recipe, "textual inversion easyneg")


def test_a_tag_in_a_prompt_does_nothing() -> None:
    recipe = read(nodes(_6={"text": "a cat <lora:x:0.8>"}))
    assert (recipe.job.prompt, recipe.job.loras) == ("a cat ", ()) and noted(recipe, "<lora:x:0.8>")


def test_a_long_prompt_is_not_cut() -> None:
    recipe = read(nodes(_6={"text": "red, " * 50}))
    assert recipe.job.prompt_syntax == "a1111" and noted(recipe, "75 tokens")
    assert read(nodes(_6={"text": "x " * 50})).notes == ()


@pytest.mark.parametrize(
    ("kind", "inputs", "expected"),
    [
        ("StringConcatenate", {"string_a": ["91", 0], "string_b": "cat", "delimiter": " "}, "a cat"),
        ("Text Concatenate", {"text_a": ["91", 0], "text_b": "cat", "delimiter": ", "}, "a, cat"),
        ("ImpactWildcardProcessor", {"wildcard_text": "{a|b}", "populated_text": "b"}, "b"),
        ("ImpactSwitch", {"select": 2, "input1": ["90", 0], "input2": ["91", 0]}, "a"),
        ("Any Switch (rgthree)", {"any_02": ["91", 0]}, "a"),
        ("ComfySwitchNode", {"switch": False, "on_true": ["90", 0], "on_false": ["91", 0]}, "a"),
    ],
)
def test_texts_that_come_through_nodes(kind: str, inputs: dict[str, Any], expected: str) -> None:
    more = {"90": (kind, inputs), "91": ("PrimitiveString", {"value": "a"})}
    recipe = read(nodes(more, _6={"text": ["90", 0]}))
    assert recipe.job.prompt == expected
    assert noted(recipe, kind) == (kind == "Text Concatenate")


def test_a_node_that_may_compute_a_value_is_named() -> None:
    more = {"90": ("StringReplace", {"string": "a dog", "find": "dog", "replace": "cat"})}
    assert noted(read(nodes(more, _6={"text": ["90", 0]})), "StringReplace")
    more = {"90": ("LLM Writer", {"model": "x", "about": "cats"})}
    recipe = read(nodes(more, _6={"text": ["90", 0]}))
    assert recipe.job.prompt == "" and noted(recipe, "prompt was not found") and noted(recipe, "LLM Writer")


@pytest.mark.parametrize("side", ["_6", "_7"])
def test_clip_skip_of_either_side_is_read(side: str) -> None:
    more = {"90": ("CLIPSetLastLayer", {"stop_at_clip_layer": -2, "clip": ["4", 1]})}
    assert read(nodes(more, **{side: {"clip": ["90", 0]}})).job.clip_skip == 2
    more["90"][1]["stop_at_clip_layer"] = -1
    assert read(nodes(more, **{side: {"clip": ["90", 0]}})).notes == ()


@pytest.mark.parametrize(
    ("kind", "inputs"),
    [
        ("ConditioningCombine", {"conditioning_1": ["6", 0], "conditioning_2": ["7", 0]}),
        ("ConditioningConcat", {"conditioning_to": ["6", 0], "conditioning_from": ["7", 0]}),
        ("ConditioningAverage", {"conditioning_to": ["6", 0], "conditioning_from": ["7", 0]}),
        ("ConditioningSetArea", {"conditioning": ["6", 0], "width": 64}),
        ("ConditioningSetTimestepRange", {"conditioning": ["6", 0], "start": 0.2}),
        ("unCLIPConditioning", {"conditioning": ["6", 0], "strength": 1.0}),
        ("ControlNetApply", {"conditioning": ["6", 0], "control_net": ["x", 0]}),
        (
            "GLIGENTextBoxApply",
            {"conditioning_to": ["6", 0], "clip": ["4", 1], "text": "a ball", "width": 64},
        ),
    ],
)
@pytest.mark.parametrize("role", ["positive", "negative"])
def test_what_is_done_to_a_prompt_is_named(kind: str, inputs: dict[str, Any], role: str) -> None:
    recipe = read(nodes({"90": (kind, inputs)}, _3={role: ["90", 0]}))
    assert noted(recipe, kind)
    assert (recipe.job.prompt if role == "positive" else recipe.job.negative_prompt) == "a cat"


def test_a_node_for_both_prompts_gives_each_its_own() -> None:
    more = {"90": ("ControlNetApplyAdvanced", {"positive": ["6", 0], "negative": ["7", 0]})}
    job = read(nodes(more, _3={"positive": ["90", 1], "negative": ["90", 0]})).job
    assert (job.prompt, job.negative_prompt) == ("blurry", "a cat")


CONTROL = {
    "91": ("ControlNetLoader", {"control_net_name": "sd15/canny.pth"}),
    "92": ("LoadImage", {"image": "edges.png"}),
}


def test_a_controlnet_is_read_with_its_hint() -> None:
    inputs = {"conditioning": ["6", 0], "control_net": ["91", 0], "image": ["92", 0], "strength": 0.8}
    recipe = read(nodes(CONTROL, {"90": ("ControlNetApply", inputs)}, _3={"positive": ["90", 0]}))
    assert recipe.job.controls == (("canny.pth", "edges.png", 0.8, 0.0, 1.0),)
    assert (recipe.job.prompt, recipe.job.hint, recipe.job.control_resize) == ("a cat", "none", "fill")
    assert noted(recipe, "canny.pth", "edges.png", "not in the file")


def test_several_controlnets_are_read_with_their_steps_and_hints() -> None:
    """A chain, each once for both prompts; the second hint is made in the graph."""
    inputs = {"positive": ["6", 0], "negative": ["7", 0], "control_net": ["91", 0], "image": ["92", 0],
              "strength": 0.5, "start_percent": 0.1, "end_percent": 0.75}  # fmt: skip
    more = {
        "89": ("Canny", {"image": ["92", 0], "low_threshold": 0.4, "high_threshold": 0.8}),
        "90": ("ControlNetApplyAdvanced", inputs),
        "93": (
            "ControlNetApplyAdvanced",
            {**inputs, "positive": ["90", 0], "negative": ["90", 1], "image": ["89", 0]},
        ),
    }
    recipe = read(nodes(CONTROL, more, _3={"positive": ["93", 0], "negative": ["93", 1]}))
    assert sorted(recipe.job.controls) == [
        ("canny.pth", "", 0.5, 0.1, 0.75), ("canny.pth", "edges.png", 0.5, 0.1, 0.75),
    ]  # fmt: skip
    assert (recipe.job.prompt, recipe.job.negative_prompt, recipe.job.hint) == ("a cat", "blurry", "canny")
    assert noted(recipe, "hint was made by node Canny") and noted(recipe, "levels of noise")


PROMPTED = {
    "91": ("IPAdapterModelLoader", {"ipadapter_file": "sd15/ip-adapter_sd15.bin"}),
    "92": ("LoadImage", {"image": "cat.png"}),
    "93": ("CLIPVisionLoader", {"clip_name": "ViT-H.safetensors"}),
    "94": ("IPAdapterUnifiedLoader", {"model": ["4", 0], "preset": "PLUS FACE (portraits)"}),
}


def test_ip_adapters_are_read_with_their_images() -> None:
    """One by its file, one by a preset: both act on the model."""
    first = {"model": ["94", 0], "ipadapter": ["94", 1], "image": ["92", 0], "weight": 0.7, "start_at": 0.0,
             "end_at": 0.5, "weight_type": "standard"}  # fmt: skip
    second = {"model": ["95", 0], "ipadapter": ["91", 0], "image": ["92", 0], "clip_vision": ["93", 0], "weight": 1.2,
              "weight_type": "linear", "combine_embeds": "concat", "start_at": 0, "end_at": 1,
              "embeds_scaling": "V only"}  # fmt: skip
    more = {"95": ("IPAdapter", first), "96": ("IPAdapterAdvanced", second)}
    recipe = read(nodes(PROMPTED, more, _3={"model": ["96", 0]}))
    assert recipe.model == "m.safetensors"
    assert sorted(recipe.job.controls) == [
        ("ip-adapter-plus-face_sd15", "cat.png", 0.7, 0.0, 0.5), ("ip-adapter_sd15.bin", "cat.png", 1.2, 0.0, 1.0),
    ]  # fmt: skip
    assert noted(recipe, "the IP-Adapter ip-adapter_sd15.bin and its image cat.png", "not in the file")
    assert noted(recipe, "levels of noise") and noted(recipe, "ViT-H.safetensors", "image_encoder")
    assert not noted(recipe, "left out")


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({"weight_type": "style transfer"}, "weight_type of its IP-Adapter: style transfer"),
        ({"embeds_scaling": "K+V"}, "embeds_scaling of its IP-Adapter: K+V"),
        ({"attn_mask": ["92", 1]}, "attn_mask"),
        ({"ipadapter": ["97", 1]}, "node IPAdapterAdvanced"),
    ],
)
def test_what_an_ip_adapter_does_otherwise_is_named(inputs: dict[str, Any], said: str) -> None:
    own = {"model": ["4", 0], "ipadapter": ["91", 0], "image": ["92", 0], "weight": 1.0}
    more = {"96": ("IPAdapterAdvanced", {**own, **inputs}),
            "97": ("IPAdapterUnifiedLoaderFaceID", {"model": ["4", 0], "preset": "FACEID PLUS V2"})}  # fmt: skip
    assert noted(read(nodes(PROMPTED, more, _3={"model": ["96", 0]})), "left out", said)


def test_zeros_are_not_the_empty_prompt() -> None:
    more = {"90": ("ConditioningZeroOut", {"conditioning": ["6", 0]})}
    recipe = read(nodes(more, _3={"negative": ["90", 0]}))
    assert recipe.job.negative_prompt == "" and noted(recipe, "ConditioningZeroOut")


# --- models


@pytest.mark.parametrize(
    ("node", "name"),
    [
        (("VAELoader", {"vae_name": "sub/other.safetensors"}), "other.safetensors"),
        (("CheckpointLoaderSimple", {"ckpt_name": "n.ckpt"}), "n.ckpt"),
        (("Odd Loader", {}), "Odd Loader"),
    ],
)
def test_another_vae_or_text_encoder_is_noted(node: tuple[str, dict[str, Any]], name: str) -> None:
    assert noted(read(nodes({"60": node}, _8={"vae": ["60", 0]})), "VAE", name)
    if node[0] != "VAELoader":
        assert noted(read(nodes({"60": node}, _7={"clip": ["60", 1]})), "text encoder", name)


def test_the_same_checkpoint_loaded_twice_is_not_another() -> None:
    more = {"60": ("CheckpointLoaderSimple", {"ckpt_name": "m.safetensors"})}
    assert read(nodes(more, _8={"vae": ["60", 2]}, _6={"clip": ["60", 1]})).notes == ()


def lora(name: str, before: str, **inputs: Any) -> tuple[str, dict[str, Any]]:
    own = {
        "lora_name": name,
        "strength_model": 0.8,
        "strength_clip": 0.7,
        "model": [before, 0],
        "clip": [before, 1],
    }
    return "LoraLoader", own | inputs


def test_loras_in_their_order() -> None:
    more = {"20": lora("a.safetensors", "4"), "21": lora("sub\\b.safetensors", "20", strength_model="0.5")}
    job = read(nodes(more, _3={"model": ["21", 0]}, _6={"clip": ["21", 1]}, _7={"clip": ["21", 1]})).job
    assert job.loras == (("a", 0.8, 0.7), ("b", 0.5, 0.7))


def test_a_lora_acts_on_the_text_where_its_text_encoder_is_used() -> None:
    more = {"20": lora("a.safetensors", "4")}
    assert read(nodes(more, _3={"model": ["20", 0]})).job.loras == (("a", 0.8, 0.0),)
    recipe = read(nodes(more, _3={"model": ["20", 0]}, _6={"clip": ["20", 1]}))
    assert recipe.job.loras == (("a", 0.8, 0.7),) and noted(recipe, "different LoRAs")


@pytest.mark.parametrize(
    ("node", "loras"),
    [
        (("LoraLoaderModelOnly", {"lora_name": "a.pt", "strength_model": 0.8}), (("a", 0.8, 0.0),)),
        (lora("None", "4"), ()),
        (lora("a.pt", "4", strength_model=0, strength_clip=0), ()),
        (lora("a.pt", "4", lora_name={"content": "a.pt", "image": None}), (("a", 0.8, 0.7),)),
        (("Power Lora Loader (rgthree)", {
            "lora_1": {"on": True, "lora": "a.pt", "strength": 0.8}, "clip": ["4", 1], "➕ Add Lora": "",
            "lora_2": {"on": False, "lora": "b.pt", "strength": 1}, "PowerLoraLoaderHeaderWidget": {"type": "x"},
            "lora_3": {"on": True, "lora": "c.pt", "strength": 0.5, "strengthTwo": 0.25},
        }), (("a", 0.8, 0.8), ("c", 0.5, 0.25))),
        (("Lora Loader Stack (rgthree)", {
            "lora_01": "a.pt", "strength_01": 0.8, "lora_02": "None", "strength_02": 1.0, "clip": ["4", 1],
        }), (("a", 0.8, 0.8),)),
    ],
)  # fmt: skip
def test_loaders_of_loras(
    node: tuple[str, dict[str, Any]], loras: tuple[tuple[str, float, float], ...]
) -> None:
    kind, inputs = node
    more = {"20": (kind, inputs | {"model": ["4", 0]})}
    recipe = read(nodes(more, _3={"model": ["20", 0]}, _6={"clip": ["20", 1]}, _7={"clip": ["20", 1]}))
    assert recipe.job.loras == loras


def test_a_lora_whose_weight_is_not_understood_is_named() -> None:
    more = {"20": ("Odd Loader", {"lora_name": "a.pt", "power": 3, "model": ["4", 0]})}
    recipe = read(nodes(more, _3={"model": ["20", 0]}))
    assert recipe.job.loras == () and noted(recipe, "LoRA a.pt", "Odd Loader")


def efficient(**inputs: Any) -> Nodes:
    own = {
        "ckpt_name": "m.safetensors", "vae_name": "Baked VAE", "clip_skip": -1, "lora_name": "ink.safetensors",
        "lora_model_strength": 0.8, "lora_clip_strength": 0.7, "positive": "a cat", "negative": "x",
        "token_normalization": "none", "weight_interpretation": "comfy", "empty_latent_width": 64,
        "empty_latent_height": 128, "batch_size": 1,
    }  # fmt: skip
    links = {"model": ["1", 0], "positive": ["1", 1], "negative": ["1", 2], "latent_image": ["1", 3]}
    graph = nodes({"1": ("Efficient Loader", own | inputs)}, _3=links, _8={"vae": ["1", 4]})
    return {key: node for key, node in graph.items() if key not in "4567"}


def test_a_loader_of_everything() -> None:
    recipe = read(efficient())
    assert recipe.job == dataclasses.replace(
        PLAIN, negative_prompt="x", height=128, loras=(("ink", 0.8, 0.7),)
    )
    assert (recipe.model, recipe.notes) == ("m.safetensors", ("it needs the LoRA ink",))
    recipe = read(efficient(clip_skip=-2, vae_name="v.pt", lora_name="None", weight_interpretation="A1111"))
    assert recipe.job.loras == ()
    assert recipe.job.clip_skip == 2 and noted(recipe, "VAE v.pt") and noted(recipe, "A1111")


def test_a_stack_of_loras() -> None:
    stack = {
        "lora_name_1": "a.pt",
        "model_str_1": 0.5,
        "clip_str_1": 0.25,
        "lora_name_2": "None",
        "lora_wt_2": 1,
    }
    graph = efficient(lora_stack=["2", 0], lora_name="None") | {
        "2": {"class_type": "LoRA Stacker", "inputs": stack}
    }
    assert read(graph).job.loras == (("a", 0.5, 0.25),)


@pytest.mark.parametrize("kind", ["FreeU", "IPAdapter", "ModelSamplingDiscrete", "HypernetworkLoader"])
def test_patches_of_the_model_are_named(kind: str) -> None:
    recipe = read(nodes({"20": (kind, {"model": ["4", 0]})}, _3={"model": ["20", 0]}))
    assert recipe.model == "m.safetensors" and noted(recipe, kind)


def test_a_merge_of_models_is_named() -> None:
    more = {"20": ("ModelMergeSimple", {"model1": ["4", 0], "model2": ["21", 0], "ratio": 0.5})}
    recipe = read(nodes(more, _3={"model": ["20", 0]}))
    assert recipe.model == "m.safetensors" and noted(recipe, "ModelMergeSimple")


# --- samplers


def advanced(**inputs: Any) -> Nodes:
    own = {key: value for key, value in SAMPLER.items() if key not in ("seed", "denoise")}
    own |= {"noise_seed": 5, "add_noise": "enable", "start_at_step": 0, "end_at_step": 10000}
    graph = nodes(IMAGE)
    own |= {"return_with_leftover_noise": "disable"}
    graph["3"] = {"class_type": "KSamplerAdvanced", "inputs": own | inputs}
    return graph


def test_an_advanced_sampler_that_runs_from_end_to_end() -> None:
    assert read(advanced()) == Recipe(PLAIN, "ComfyUI", "m.safetensors")


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"end_at_step": 5, "return_with_leftover_noise": "enable"}, ("step 5 of 10", "left over")),
        ({"end_at_step": "5"}, ("step 5 of 10",)),
        ({"start_at_step": 4}, ("part-way", "0.6")),
        ({"start_at_step": 10}, ("step 10 of 10",)),
        ({"add_noise": "disable"}, ("adds no noise",)),
    ],
)
def test_a_part_of_the_schedule_is_noted(inputs: dict[str, Any], words: tuple[str, ...]) -> None:
    assert noted(read(advanced(**inputs)), *words)


def test_an_advanced_sampler_that_begins_late_has_a_strength() -> None:
    job = read(advanced(start_at_step=4, latent_image=["70", 0])).job
    assert (job.strength, job.steps, job.init) == (0.6, 10, Init("photo.png"))


def test_a_part_of_the_schedule_from_an_empty_image_is_noted() -> None:
    assert noted(read(nodes(_3={"denoise": 0.8})), "denoise 0.8", "empty")


def custom(kind: str = "CFGGuider", **replaced: tuple[str, dict[str, Any]]) -> Nodes:
    links = {"model": ["4", 0], "positive": ["6", 0], "negative": ["7", 0]}
    guider = {"model": ["4", 0], "conditioning": ["6", 0]} if kind == "BasicGuider" else links | {"cfg": 7.0}
    parts = {
        "noise": ("RandomNoise", {"noise_seed": 5}),
        "guider": (kind, guider),
        "sampler": ("KSamplerSelect", {"sampler_name": "ddim"}),
        "sigmas": (
            "BasicScheduler",
            {"scheduler": "ddim_uniform", "steps": 10, "denoise": 1.0, "model": ["4", 0]},
        ),
    }
    graph = nodes(parts | replaced)
    inputs = {name: [name, 0] for name in parts} | {"latent_image": ["5", 0]}
    return graph | {"3": {"class_type": "SamplerCustomAdvanced", "inputs": inputs}}


def test_a_sampler_of_parts() -> None:
    assert read(custom()) == Recipe(PLAIN, "ComfyUI", "m.safetensors")
    assert read(custom("BasicGuider")).job == dataclasses.replace(PLAIN, negative_prompt="", scale=1.0)


@pytest.mark.parametrize(
    ("part", "node", "words"),
    [
        ("noise", ("DisableNoise", {}), ("adds no noise",)),
        ("guider", ("DualCFGGuider", {"model": ["4", 0], "cond1": ["6", 0]}), ("DualCFGGuider",)),
        ("sampler", ("SamplerEulerAncestral", {"eta": 1.0}), ("noise of its steps", "NVIDIA")),
        ("sigmas", ("LaplaceScheduler", {"steps": 10}), ("LaplaceScheduler",)),
        ("sigmas", ("SplitSigmas", {"sigmas": ["x", 0], "step": 5}), ("SplitSigmas",)),
        ("sigmas", ("ManualSigmas", {"sigmas": "14.6, 2, 0"}), ("ManualSigmas",)),
    ],
)
def test_parts_of_a_sampler_are_named(
    part: str, node: tuple[str, dict[str, Any]], words: tuple[str, ...]
) -> None:
    recipe = read(custom(**{part: node}))
    assert recipe.job.prompt == ("" if "Dual" in node[0] else "a cat") and noted(recipe, *words)


def test_an_unknown_sampler_is_named() -> None:
    graph = nodes()
    graph["3"]["class_type"] = "KSampler //Inspire"
    recipe = read(graph)
    assert recipe.job == PLAIN and noted(recipe, "KSampler //Inspire")
    with pytest.raises(InputError, match="easy kSampler"):
        read({"1": {"class_type": "easy kSampler", "inputs": {"pipe": ["2", 0]}}})


LONG = 2**63 + 5


@pytest.mark.parametrize(("mode", "rng", "seed"), [("GPU(=A1111)", "philox", LONG), ("CPU", "cpu", LONG)])
def test_the_inspire_pack_says_where_its_noise_is_drawn(mode: str, rng: str, seed: int) -> None:
    noise = {"noise_mode": mode, "batch_seed_mode": "incremental"}
    graph = nodes(_3=noise | {"seed": LONG})
    graph["3"]["class_type"] = "KSampler //Inspire"
    beside = custom(noise=("RandomNoise //Inspire", noise | {"noise_seed": LONG}))
    for recipe in (read(graph), read(beside)):
        assert (recipe.job.rng, recipe.job.seed, recipe.job.seed_mode) == (rng, seed, "image")
        assert noted(recipe, "NVIDIA") == (rng == "philox")


def test_the_inspire_pack_can_count_seeds_up_in_a_batch() -> None:
    noise = {"noise_mode": "GPU(=A1111)", "seed": LONG}
    pick = {"20": ("ImageFromBatch", {"image": ["8", 0], "batch_index": 2, "length": 1})}
    for seed_mode, known in (
        ("incremental", {"seed": LONG + 2}),
        ("comfy", {"seed": LONG, "seed_mode": "batch", "batch_index": 2}),
    ):
        of_all = nodes(_3=noise | {"batch_seed_mode": seed_mode}, _5={"batch_size": 4})
        recipe = read(of_all)
        first = {"seed": LONG, "rng": "philox", "seed_mode": known.get("seed_mode", "image")}
        assert recipe.job == dataclasses.replace(PLAIN, **first) and noted(recipe, "batch of 4", "first")
        of_one = nodes(
            pick, _3=noise | {"batch_seed_mode": seed_mode}, _5={"batch_size": 4}, _9={"images": ["20", 0]}
        )
        recipe = read(of_one)
        assert recipe.job == dataclasses.replace(PLAIN, rng="philox", **known) and not noted(
            recipe, "batch of 4"
        )


def test_settings_in_a_pipe() -> None:
    pipe = {"model": ["4", 0], "clip": ["4", 1], "vae": ["4", 2], "positive": ["6", 0], "negative": ["7", 0]}
    graph = nodes({"80": ("ToBasicPipe", pipe)})
    own = {key: value for key, value in SAMPLER.items() if key not in pipe}
    graph["3"] = {"class_type": "ImpactKSamplerBasicPipe", "inputs": own | {"basic_pipe": ["80", 0]}}
    assert read(graph).job == PLAIN


@pytest.mark.parametrize("changed", [{"steps": "10", "cfg": "7.0", "seed": "5"}, {"steps": 10.0, "cfg": 7}])
def test_numbers_that_are_written_otherwise(changed: dict[str, Any]) -> None:
    job = read(nodes(_3=changed, _5={"width": "64"})).job
    assert job == PLAIN and isinstance(job.steps, int)


# --- starts


@pytest.mark.parametrize(
    "image", ["photo 1.png", "photo 1.png [input]", "clipspace/photo 1.png [output]", "a\\photo 1.png [temp]"]
)
def test_annotations_of_an_image(image: str) -> None:
    job = read(nodes(IMAGE, _3={"latent_image": ["70", 0], "denoise": 0.6}, _71={"image": image})).job
    assert job.init == Init("photo 1.png")


def test_an_image_that_is_scaled_first() -> None:
    scale = {"72": ("ImageScale", {"image": ["71", 0], "width": 128, "height": 64, "crop": "center"})}
    graph = nodes(IMAGE, scale, _3={"latent_image": ["70", 0], "denoise": 0.6}, _70={"pixels": ["72", 0]})
    assert read(graph).job.init == Init("photo.png", width=128, height=64, resize="fill")
    graph["72"]["inputs"]["crop"] = "disabled"
    assert read(graph).job.init == Init("photo.png", width=128, height=64, resize="stretch")
    graph["72"] = {"class_type": "ImageScaleBy", "inputs": {"image": ["71", 0], "scale_by": 2.0}}
    assert noted(read(graph), "ImageScaleBy", "before")


def test_an_image_of_an_unknown_loader() -> None:
    more = {"71": ("Base64 Image", {"data": "x"})}
    recipe = read(nodes(IMAGE, more, _3={"latent_image": ["70", 0], "denoise": 0.6}))
    assert (recipe.job.init, recipe.job.strength) == (None, 0.6)
    assert noted(recipe, "Base64 Image") and noted(recipe, "starts from")


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (("LoadImage", {"image": "photo.png [input]"}), Init("photo.png", alpha_mask=True, mask_blur=0.0)),
        (
            ("LoadImageMask", {"image": "m.png", "channel": "red"}),
            Init("photo.png", mask="m.png", mask_blur=0.0),
        ),
        (
            ("InvertMask", {"mask": ["74", 0]}),
            Init("photo.png", mask="n.png", invert_mask=True, mask_blur=0.0),
        ),
        (("SolidMask", {"value": 1.0}), Init("photo.png")),
    ],
)
@pytest.mark.parametrize("kind", ["VAEEncodeForInpaint", "SetLatentNoiseMask"])
def test_masks(mask: tuple[str, dict[str, Any]], expected: Init, kind: str) -> None:
    more = {"73": mask, "74": ("LoadImageMask", {"image": "n.png", "channel": "green"})}
    if kind == "VAEEncodeForInpaint":
        more["75"] = (kind, {"pixels": ["71", 0], "vae": ["4", 2], "mask": ["73", 1], "grow_mask_by": 6})
    else:
        more["75"] = (kind, {"samples": ["70", 0], "mask": ["73", 1]})
    recipe = read(nodes(IMAGE, more, _3={"latent_image": ["75", 0]}))
    assert (recipe.job.init, recipe.job.paste) == (expected, False)
    assert noted(recipe, "mask was not found") == (mask[0] == "SolidMask")
    assert noted(recipe, "grow_mask_by 6") == (kind == "VAEEncodeForInpaint")


def test_an_inpainting_model_s_conditioning() -> None:
    inputs = {
        "positive": ["6", 0],
        "negative": ["7", 0],
        "vae": ["4", 2],
        "pixels": ["71", 0],
        "mask": ["71", 1],
    }
    links = {"positive": ["75", 0], "negative": ["75", 1], "latent_image": ["75", 2]}
    job = read(nodes(IMAGE, {"75": ("InpaintModelConditioning", inputs)}, _3=links)).job
    assert (job.prompt, job.negative_prompt) == ("a cat", "blurry")
    assert job.init == Init("photo.png", alpha_mask=True, mask_blur=0.0)


def test_one_entry_of_a_batch_is_drawn_at_its_place() -> None:
    picked = {"90": ("LatentFromBatch", {"samples": ["5", 0], "batch_index": 2, "length": 1})}
    job = read(nodes(picked, _3={"latent_image": ["90", 0]}, _5={"batch_size": 4})).job
    assert (job.seed_mode, job.batch_index) == ("batch", 2)
    theirs = torch.randn((4, 4, 8, 8), generator=torch.Generator().manual_seed(5))
    ours = noise_source(job.rng, job.seed_mode, [job.seed], "cpu").draw((4, 4, 8, 8))
    assert torch.equal(ours[job.batch_index], theirs[2])


def test_a_repeated_latent_is_a_batch() -> None:
    repeated = {"90": ("RepeatLatentBatch", {"samples": ["5", 0], "amount": 3})}
    recipe = read(nodes(repeated, _3={"latent_image": ["90", 0]}))
    assert recipe.job.seed_mode == "batch" and noted(recipe, "batch of 3")


def test_a_size_that_is_not_found_is_the_file_s() -> None:
    more = {"5": ("Latent Size Picker", {"resolution": "64x96 (2:3)"})}
    recipe = read(nodes(more), Origin("x.png", (64, 96)))
    assert (recipe.job.width, recipe.job.height) == (64, 96)
    assert noted(recipe, "Latent Size Picker") and noted(recipe, "the file's")


# --- later passes


@pytest.mark.parametrize(
    ("node", "size", "place"),
    [
        (("LatentUpscale", {"samples": ["3", 0], "width": 96, "height": 96}), (96, 96), "latents"),
        (("LatentUpscale", {"samples": ["3", 0], "width": 96, "height": 0}), (96, 96), "latents"),
        (("ImageScaleBy", {"image": ["8", 0], "scale_by": 1.5}), (96, 96), "pixels"),
        (("ImageScale", {"image": ["8", 0], "width": 96, "height": 96}), (96, 96), "pixels"),
        (("ImageUpscaleWithModel", {"image": ["8", 0], "upscale_model": ["x", 0]}), (96, 96), "pixels"),
    ],
)
def test_second_passes(node: tuple[str, dict[str, Any]], size: tuple[int, int], place: str) -> None:
    encode = {"14": ("VAEEncode", {"pixels": ["10", 0], "vae": ["4", 2]})}
    between = "10" if place == "latents" else "14"
    graph = nodes(HIRES, {"10": node}, encode, _11={"latent_image": [between, 0]}, _9={"images": ["12", 0]})
    recipe = read(graph, Origin("x.png", size))
    assert (recipe.job.upscale, recipe.job.upscale_in, recipe.job.upscale_strength) == (1.5, place, 0.5)
    assert noted(recipe, "upscaling model") == (node[0] == "ImageUpscaleWithModel")


def test_passes_that_are_not_upscaling_are_noted() -> None:
    graph = nodes(HIRES, _11={"latent_image": ["3", 0]}, _9={"images": ["12", 0]})
    recipe = read(graph)
    assert recipe.job == PLAIN and noted(recipe, "later passes")


@pytest.mark.parametrize(
    "kind", ["ImageScaleBy", "ImageUpscaleWithModel", "UltimateSDUpscale", "FaceDetailer"]
)
def test_what_is_done_after_the_last_pass_is_named(kind: str) -> None:
    more = {"90": (kind, {"image": ["8", 0], "scale_by": 2.0})}
    recipe = read(nodes(more, _9={"images": ["90", 0]}))
    assert recipe.job == PLAIN and noted(recipe, kind)


# --- other forms, and hostile ones


def test_the_editor_s_form_is_named(tmp_path: Path) -> None:
    text = json.dumps({"last_node_id": 1, "nodes": [{"id": 1, "type": "KSampler", "mode": 4}], "links": []})
    for key in ("workflow", "prompt"):
        with pytest.raises(InputError, match="editor"):
            read_job(png(tmp_path / "x.png", **{key: text}))


def test_a_graph_as_the_api_is_sent_it() -> None:
    assert read({"prompt": nodes(), "client_id": "x"}).job == PLAIN


def test_a_link_to_no_node_is_named() -> None:
    recipe = read(nodes(_3={"model": ["99", 0]}))
    assert noted(recipe, "99", "lacks") and noted(recipe, "model was not found")


def test_texts_that_join_themselves_end() -> None:
    parts = {
        f"t{i}": ("concat", {"text_a": [f"t{i + 1}", 0], "text_b": [f"t{i + 1}", 0]}) for i in range(500)
    }
    loop = {"t500": ("concat", {"text_a": ["t0", 0], "text_b": "x" * 50_000})}
    assert len(read(nodes(parts, loop, _6={"text": ["t0", 0]})).job.prompt) <= 100_000


def test_sizes_that_grow_without_end_are_read() -> None:
    chain = {f"u{i}": ("LatentUpscaleBy", {"samples": [f"u{i + 1}", 0], "scale_by": 64}) for i in range(500)}
    chain["u500"] = ("Reroute", {"samples": ["3", 0]})
    assert noted(read(nodes(chain, _8={"samples": ["u0", 0]})), "LatentUpscaleBy")


ODD = [
    None, True, -1, 0, 10**400, 0.5, 1e400, float("nan"), "", "x", "nan", "1e999", "9" * 60, [], {}, ["3", 0],
    ["6", 9], [3], [[], 0], ["99", 0], {"content": "a"}, {"on": True, "lora": "a", "strength": "x"}, "\x1b",
    "(" * 200, [None] * 3,
]  # fmt: skip


@pytest.mark.parametrize("count", [150, pytest.param(1500, marks=pytest.mark.fuzz)])
def test_any_value_of_a_graph_may_be_of_a_wrong_type(count: int) -> None:
    draw = random.Random(0)
    starts = [nodes(HIRES), efficient(), custom(), advanced(start_at_step=2, latent_image=["70", 0])]
    read_at_all = 0
    for _ in range(count):
        graph = copy.deepcopy(draw.choice(starts))
        for _ in range(draw.randint(1, 5)):
            node = draw.choice([node for node in graph.values() if isinstance(node.get("inputs"), dict)])
            name = draw.choice([*node["inputs"], "lora_name", "mask", "vae", "batch_index"])
            node["inputs"][name] = draw.choice(ODD)
            if draw.random() < 0.1:
                node[draw.choice(["class_type", "inputs"])] = draw.choice(ODD)
        try:
            recipe = read(graph, Origin("x.png", (64, 64)))
        except InputError as error:
            assert str(error).isprintable()
            continue
        read_at_all += 1
        assert read_record(record(recipe.job, {})).job == recipe.job
        assert all(note.isprintable() for note in recipe.notes)
    assert read_at_all > count / 3
