"""Which layer of the model, and which part of its change, a key of a LoRA file means, in every usual naming."""

from __future__ import annotations

import re
from typing import NamedTuple

from ldm.checkpoints.layouts.names import to_diffusers
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.keys import COND_STAGE_PREFIX, UNET_PREFIX
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.encoders.modules import FrozenCLIPEmbedder

UNET, TEXT = UNET_PREFIX, f"{COND_STAGE_PREFIX}transformer."

_FACTORS = (
    *(f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
    *(f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")),
    *("dora_scale", "diff", "diff_b", "w_norm", "b_norm", "alpha"),
)
# the end of a key, and what it holds; the first that fits decides
_PARTS = (
    *((f"{joint}.{end}.weight", end) for joint in ("_lora", ".lora", ".lora_linear_layer") for end in ("down", "up")),
    *((f"{joint}.alpha", "alpha") for joint in ("_lora", ".lora", ".lora_linear_layer")),
    *((f".lora_{end}.weight", end) for end in ("down", "up", "mid")),
    (".lora_A.weight", "down"),
    (".lora_B.weight", "up"),
    (".lora_magnitude_vector.weight", "magnitude"),
    (".lora_magnitude_vector", "magnitude"),
    *((f".{name}", name) for name in _FACTORS),
)  # fmt: skip
_OTHER_KINDS = {
    ".oft_blocks": "OFT",
    ".oft_diag": "OFT",
    ".oft_R": "OFT",
    ".on_input": "IA3",
    ".a1.weight": "GLoRA",
}
_ADAPTER = re.compile(r"(\.lora_(?:A|B|magnitude_vector))\.(?!weight$)[^.]+(\.weight|)$")
_TEXT_PROJECTION = re.compile(r"self_attn_(q|k|v|out)_proj$")
_PREFIXES = (
    "base_model_model_",
    "lora_unet_",
    "lora_te_",
    "lora_te1_",
    "te_",
    "te1_",
    "lycoris_",
    "unet_",
    "text_encoder_",
    "text_encoders_",
    "clip_l_",
    "transformer_",
    "model_diffusion_model_",
    "diffusion_model_",
    "cond_stage_model_",
    "module_",
)


class Key(NamedTuple):
    """A key of a file: the layer it names, dots kept, and the part of the layer's change that it holds."""

    layer: str
    part: str


def split_key(key: str) -> Key | None:
    """The layer and the part (`down`, `up`, `alpha`, `hada_w1_a`, ...) that a key means; None if it is unknown.

    PEFT may name its adapter after the part, as in `lora_A.default.weight`.
    """
    key = _ADAPTER.sub(r"\1\2", key)
    for end, part in _PARTS:
        if key.endswith(end) and len(key) > len(end):
            return Key(key.removesuffix(end), part)
    return None


def other_kind(key: str) -> str | None:
    """The name of a relative of LoRA that is not supported, if a key belongs to one."""
    if key.startswith("oft_unet_"):
        return "OFT"
    return next((kind for end, kind in _OTHER_KINDS.items() if key.endswith(end)), None)


def flat_name(layer: str) -> str:
    """A layer's name with `_` for `.`, without the prefixes that programs put before it."""
    name = layer.replace(".processor", "").replace("_orig_mod.", "").replace(".", "_")
    while prefix := next((p for p in _PREFIXES if name.startswith(p)), None):
        name = name.removeprefix(prefix)
    return name


def layers_by_name(model: LatentDiffusion) -> dict[str, str]:
    """The path of every layer with a weight, in the model's own tree, by each flat name that files give it."""
    prefixes = [UNET] if isinstance(model.model.diffusion_model, UNetModel) else []
    if isinstance(model.cond_stage_model, FrozenCLIPEmbedder):
        prefixes.append(TEXT)
    keys = [key for key in model.state_dict() if key.startswith(tuple(prefixes)) and key.endswith(".weight")]
    layers: dict[str, str] = {}
    for key, theirs in _diffusers_keys(model, keys).items():
        path = key.removesuffix(".weight")
        for name in (flat_name(path), flat_name(theirs.removesuffix(".weight"))):
            for alias in (name, *_aliases(name)):
                layers[alias] = path
    return layers


def written_names(model: LatentDiffusion, layout: str) -> dict[str, str]:
    """Returns the name that files of `layout` ("kohya" or "diffusers") give each layer, by its path in the model."""
    keys = [key for key in model.state_dict() if key.startswith((UNET, TEXT)) and key.endswith(".weight")]
    names: dict[str, str] = {}
    for key, theirs in _diffusers_keys(model, keys).items():
        path, name = key.removesuffix(".weight"), theirs.removesuffix(".weight")
        of_text = path.startswith(TEXT)
        if layout == "kohya":
            names[path] = f"lora_{'te' if of_text else 'unet'}_{name.replace('.', '_')}"
        else:
            names[path] = f"{'text_encoder' if of_text else 'unet'}.{name}"
    return names


def _diffusers_keys(model: LatentDiffusion, keys: list[str]) -> dict[str, str]:
    """Diffusers' name of every key, without the part it belongs to."""
    state_dict = model.state_dict()
    parts = to_diffusers({key: state_dict[key] for key in keys})
    theirs = [*parts["unet"], *parts["text_encoder"]]
    ours = sorted(
        keys, key=lambda key: not key.startswith(UNET)
    )  # a stable sort: the order of each part stays
    return dict(zip(ours, theirs, strict=True))


def _aliases(name: str) -> list[str]:
    """Other names of a layer: early files of diffusers lack an index, and name both attentions alike."""
    if name.endswith("_to_out_0"):
        return [name.removesuffix("_0")]
    aliases = [name.removeprefix("text_model_")]
    if match := _TEXT_PROJECTION.search(name):
        aliases.append(f"{name[: match.start()]}self_attn_to_{match[1]}")
    return aliases
