"""Jobs, texts and files of this toolkit and of other programs, for the tests of metadata."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm.job import Init, Job
from ldm.metadata.read import Recipe

EXTRAS = {"Version": "1.2", "Model hash": "6ce0161689", "Model": "v1-5, pruned: ema", "Precision": "full"}
HOSTILE = [
    "",
    " ",
    "\n",
    "\n\nleading and trailing  \n",
    "two\nlines",
    "Negative prompt: not one",
    "a\nNegative prompt: x\nb",
    "a cat\nSteps: 3, Sampler: PLMS, CFG scale: 1, Seed: 0, Size: 8x8",
    'quotes " and \\ backslashes \\" \\u0000',
    "commas, colons: and, more: of, them: all",
    "<script>alert(1)</script> [/] %s {} {0} </style>",
    "NUL\x00 ESC\x1b[31m C1\x9b DEL\x7f",
    "CR\rLF\r\nVT\x0bFF\x0cFS\x1cNEL\x85LS\u2028PS\u2029",
    "bidi \u202e override",
    "日本語, кошка, 👩‍🚀, é vs e\u0301",
    "lone surrogate \ud800 here",
    "512x512",
    'Exact prompt: "x"',
    "Exact prompt, Exact negative prompt: \x00, Seed: 5",
    "\ufeffBOM",
]
FULL = Job(
    prompt="a cat",
    negative_prompt="dog",
    seed=2**64 - 1,
    width=768,
    height=8,
    steps=999,
    sampler="plms",
    scale=0.1 + 0.2,
    eta=1e-7,
    timestep_spacing="compvis",
    rng="device",
    seed_mode="batch",
    batch_index=5,
    init=Init(
        image="photo, of: me.png",
        width=768,
        height=8,
        resize="pad",
        background="#102030",
        outpaint=(8, 0, 16, 24),
        mask="mask.png",
        alpha_mask=True,
        invert_mask=True,
        mask_blur=0.5,
        mask_levels=True,
        crop_to_mask=24,
    ),
    strength=0.3,
    posterior="mean",
    paste=False,
    upscale=1.5,
    upscale_in="latents",
    upscale_strength=1 / 3,
    guidance_interval=(0.1, 1 / 3),
    guidance_interval_in="sigma",
    guidance_schedule="linear_down",
    loras=(("ink", 0.8, 0.8), ("film, grain", 1.0, -0.25)),
    prompt_syntax="a1111",
    schedule="karras",
    sigmas=(14.6, 0.5, 0.0),
    timesteps=(999.0, 1.5),
    s_noise=0.9,
    s_churn=2.5,
    convention="comfyui",
    step_noise="brownian",
    step_rng="cpu",
    step_seed_delta=31337,
    clip_skip=2,
    image_scale=1.25,
    guidance_rescale=0.7,
    variation_seed=2**63,
    variation_strength=0.25,
    seamless="x",
    controls=(("a, b.pth", "h: 1.png", 0.5, 0.25, 0.75), ("c.safetensors", "d.png", 1.0, 0.0, 1.0)),
    hint="inpaint",
    control_mode="guess",
    control_resize="pad",
    cache_steps=(3, 1, 10),
    merge_tokens=0.5,
)
PIXELS = np.zeros((8, 8, 3), np.uint8)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["n3", "n6"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
INVOKE = {
    "generation_mode": "txt2img", "positive_prompt": "a cat", "negative_prompt": "dog", "width": 512, "height": 640,
    "seed": 7, "rand_device": "cpu", "cfg_scale": 7.5, "steps": 50, "scheduler": "ddim", "clip_skip": 0,
    "model": {"name": "v1-5", "hash": "blake3:abc", "base": "sd-1"}, "vae": None,
    "loras": [{"model": {"name": "b"}, "weight": 0.75}], "app_version": "5.0",
}  # fmt: skip
XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description xmlns:exif="http://ns.adobe.com/exif/1.0/" {}</rdf:Description></rdf:RDF></x:xmpmeta>'
)
ELEMENT = '><exif:UserComment><rdf:Alt><rdf:li xml:lang="x-default">{}</rdf:li></rdf:Alt></exif:UserComment>'


def png(path: Path, **texts: str) -> str:
    """A PNG file with texts under these keywords (underscores become hyphens)."""
    info = PngInfo()
    for key, text in texts.items():
        info.add_text(key.replace("sd_metadata", "sd-metadata"), text)
    Image.fromarray(PIXELS).save(path, pnginfo=info)
    return str(path)


def noted(recipe: Recipe, *words: str) -> bool:
    """Returns whether one note holds all the words."""
    return any(all(word in note for word in words) for note in recipe.notes)


def graph(**changes: dict[str, Any]) -> dict[str, Any]:
    """ComfyUI's first workflow, with inputs of nodes changed."""
    nodes: dict[str, tuple[str, dict[str, Any]]] = {
        "n3": ("KSampler", {
            "seed": 156680208700286, "steps": 20, "cfg": 8, "sampler_name": "ddim", "scheduler": "ddim_uniform",
            "denoise": 1.0, "model": ["n4", 0], "positive": ["n6", 0], "negative": ["n7", 0],
            "latent_image": ["n5", 0],
        }),
        "n4": ("CheckpointLoaderSimple", {"ckpt_name": "sd/v1-5.ckpt"}),
        "n5": ("EmptyLatentImage", {"width": 512, "height": 768, "batch_size": 1}),
        "n6": ("CLIPTextEncode", {"text": "a cat", "clip": ["n4", 1]}),
        "n7": ("CLIPTextEncode", {"text": "dog", "clip": ["n4", 1]}),
        "n8": ("VAEDecode", {"samples": ["n3", 0], "vae": ["n4", 2]}),
        "n9": ("SaveImage", {"filename_prefix": "ComfyUI", "images": ["n8", 0]}),
    }  # fmt: skip
    return {key: {"class_type": kind, "inputs": i | changes.get(key, {})} for key, (kind, i) in nodes.items()}
