"""Recognises a state dict by its keys and shapes, to name it and to explain in one line why it does not fit."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ldm.models.keys import COND_STAGE_PREFIX, EMA_PREFIX, FIRST_STAGE_PREFIX, UNET_PREFIX
from ldm.util import is_mapping, printable

Part = Literal[
    "", "model", "U-Net", "autoencoder", "text encoder", "ControlNet", "LoRA", "embedding", "safety checker",
    "motion module", "T2I-Adapter", "IP-Adapter", "upscaler", "hypernetwork", "CLIP", "LongCLIP", "image encoder",
]  # fmt: skip

V1 = "Stable Diffusion v1"
V2 = "Stable Diffusion v2"
SDXL = "SDXL"
LAION = "LDM text2img-large (LAION-400M)"
INPAINTING, EDIT = "inpainting", "InstructPix2Pix"

# Where CompVis keeps each part of a model.
COMPVIS_PREFIXES: Mapping[Part, str] = {
    "U-Net": UNET_PREFIX,
    "autoencoder": FIRST_STAGE_PREFIX,
    "text encoder": COND_STAGE_PREFIX,
}
_LAION_KEY = f"{COND_STAGE_PREFIX}transformer.token_emb.weight"
LONG_POSITIONS = 248  # of tokens in a prompt, where CLIP has 77
_MOST_LEAVES = 100_000
_NAMED = 5
# columns of the matrices by which a U-Net, or what changes one, reads the text
_FAMILIES = {768: V1, 1024: V2, 1280: LAION, 2048: SDXL}
# channels that a U-Net's first convolution takes
_VARIANTS = {
    5: "depth",
    7: "upscaler",
    8: EDIT,
    9: INPAINTING,
}
_CONFIGS = {INPAINTING: "inpainting", EDIT: "edit"}  # of v1 models with such a U-Net
_TEXT_WIDTHS = {768: V1, 1024: V2}
# whose layer a key of an adapter names, in any program's spelling; the first that fits decides
_ADAPTED = (
    ("Stable Cascade", re.compile(r"lora_prior_(unet|te)_")),
    ("Flux", re.compile(r".*[._](double|single|single_transformer)_blocks[._]\d")),
    ("Stable Diffusion 3", re.compile(r".*[._](joint_blocks[._]\d|attn[._](add_[qkv]_proj|to_add_out))|lora_te3_")),
    ("Wan", re.compile(r"(diffusion_model\.|lora_unet_)blocks[._]\d+[._](self|cross)_attn[._][qkvo]\b")),
    ("a model with a T5 text encoder", re.compile(r"(text_encoders\.)?t5xxl\.|text_encoder_[23]\.encoder\.block\.")),
    (SDXL, re.compile(r"(lora_)?te2_|text_encoder_2\.|(text_encoders\.)?clip_g\.|conditioner\.|.*[._]label_emb[._]")),
    ("a diffusion transformer", re.compile(r"(lora_)?transformer[._](transformer_blocks|blocks|layers)[._]\d")),
)  # fmt: skip

# The kind of file that a key means; the first pattern that a key begins with (or holds, after `.*`) decides.
_PARTS: tuple[tuple[str, Part, str], ...] = (
    (r".*motion_modules\.", "motion module", ""),
    (r"(image_proj|ip_adapter)(\.|$)|.*\bto_[kv]_ip\.", "IP-Adapter", ""),
    (r"(adapter\.)?body\.\d+\.(resnets\.|block[12]\.|in_conv\.)", "T2I-Adapter", ""),
    (r"model\.\d+\.sub\.\d+\.RDB\d|body\.\d+\.rdb\d", "upscaler", ""),
    (r"(lora|lycoris|oft)_(unet|te)|lycoris_|base_model\.model\.|.*(\.lora_(A|B|down|up)\b)", "LoRA", ""),
    (r".*(_lora\.(down|up)\.|\.lora\.(down|up)\.|lora_linear_layer|\.hada_w1|\.lokr_w)", "LoRA", ""),
    (r"control_model\.|input_hint_block\.|zero_convs\.|lora_controlnet$", "ControlNet", "CompVis"),
    (r"controlnet_(cond_embedding|down_blocks|mid_block)", "ControlNet", "diffusers"),
    (r"positional_embedding_res$", "LongCLIP", ""),
    (r"positional_embedding$", "CLIP", ""),
    (r"(layer_structure|activation_func)$", "hypernetwork", ""),
    (r"string_to_param", "embedding", "A1111"),
    (r"emb_params$", "embedding", "kohya"),
    (r"concept_embeds", "safety checker", "diffusers"),
    (
        "|".join(
            map(re.escape, ("conditioner.", *COMPVIS_PREFIXES.values(), f"{EMA_PREFIX}diffusion_model"))
        ),
        "model",
        "CompVis",
    ),
    (r"(unet\.)?(down_blocks|mid_block|up_blocks)\.(\d+\.)?(resnets|attentions)\.", "U-Net", "diffusers"),
    (r"(diffusion_model\.)?(input_blocks|middle_block|output_blocks)\.", "U-Net", "CompVis"),
    (r"(vae\.)?(encoder\.down|decoder\.up)\.", "autoencoder", "CompVis"),
    (r"(vae\.)?(encoder|decoder)\.layers\.\d+\.conv\.", "autoencoder", "diffusers TAESD"),
    (r"(taesd_(encoder|decoder)\.)?\d+\.conv\.\d\.", "autoencoder", "TAESD"),
    (r"(vae\.)?(encoder\.down_blocks|decoder\.up_blocks)\.", "autoencoder", "diffusers"),
    (
        r"(text_encoder\.|transformer\.)?(text_model|embeddings|final_layer_norm)\.",
        "text encoder",
        "diffusers",
    ),
    (r"(vision_model|visual_projection|visual)\.", "image encoder", ""),
)
# How an adapter changes a weight, other than by the product of two matrices.
_METHODS = (
    (".hada_w1_a", "LoHa"),
    (".lokr_w", "LoKr"),
    (".oft_", "OFT"),
    (".on_input", "IA3"),
    (".b2.weight", "GLoRA"),
    (".dora_scale", "DoRA"),
)
_NAMES: dict[Part, str] = {
    "": "an unknown state dict",
    "model": "a latent diffusion model",
    "U-Net": "a U-Net alone",
    "autoencoder": "an autoencoder (VAE) alone",
    "text encoder": "a text encoder alone",
    "ControlNet": "a ControlNet",
    "LoRA": "a LoRA",
    "embedding": "a textual inversion embedding",
    "safety checker": "a safety checker",
    "motion module": "a motion module (AnimateDiff)",
    "T2I-Adapter": "a T2I-Adapter",
    "IP-Adapter": "an IP-Adapter",
    "upscaler": "an upscaler (ESRGAN)",
    "hypernetwork": "a hypernetwork",
    "CLIP": "a CLIP under OpenAI's names",
    "LongCLIP": "a LongCLIP (248 positions, where v1 has 77) under OpenAI's names",
    "image encoder": "an image encoder (of CLIP) alone",
}


@dataclass(frozen=True, slots=True)
class ModelKind:
    """The kind of a state dict: which `part`, of a model of which `family`, with keys in the style of `layout`.

    `variant` names the U-Net's other inputs ("inpainting": a mask and a masked image). What is not known is
    empty: `part` for an unknown state dict, `family` for a model of other sizes than the published ones.
    """

    part: Part
    family: str = ""
    variant: str = ""
    layout: str = ""

    @property
    def name(self) -> str:
        """For messages: "Stable Diffusion v1 inpainting", "a LoRA for SDXL in the kohya layout", ..."""
        model = " ".join(filter(None, (self.family, self.variant)))
        if self.part in ("model", "U-Net") and self.layout == "CompVis" and model:
            return model if self.part == "model" else f"the U-Net of {model} alone"
        return (
            _NAMES[self.part]
            + (f" for {model}" if model else "")
            + (f" in the {self.layout} layout" if self.layout not in ("", "CompVis") else "")
        )


def kind_of(state_dict: Mapping[str, Any]) -> ModelKind:
    """The kind of a state dict, by its keys and its tensors' shapes; mappings in it count with their keys."""
    shapes = {key: _shape(value) for key, value in tensors_in(state_dict)}
    part, layout = _part(shapes)
    if part == "LoRA":
        return ModelKind(part, _family_of_adapter(shapes), "", _flavour(shapes))
    if part == "embedding":
        return ModelKind(part, _TEXT_WIDTHS.get(_size(shapes, ""), ""), "", layout)
    if part == "":
        return _kind_of_one_tensor(shapes)
    first_convolution = (
        r"(^|\.)(input_blocks\.0\.0\.|(?<!coder\.)conv_in\.|diffusion_modelinput_blocks00)weight$"
    )
    takes_channels = part in ("model", "U-Net", "ControlNet")
    variant = _VARIANTS.get(_size(shapes, first_convolution, axis=1), "") if takes_channels else ""
    if _size(shapes, r"\.position_embedding\.weight$", axis=0) == LONG_POSITIONS:
        variant = " ".join(filter(None, (variant, f"with LongCLIP ({LONG_POSITIONS} positions)")))
    return ModelKind(part, _family(shapes), variant, layout)


def tensors_in(tree: Mapping[str, Any], depth: int = 3) -> Iterator[tuple[str, Any]]:
    """Keys and values of a mapping and of those in it, the names of each level joined by dots.

    Mappings below `depth` levels stay whole, and what comes after the first 100,000 values is left out: a file
    may let one mapping occur in many places.
    """
    return itertools.islice(_leaves(tree, depth), _MOST_LEAVES)


def _leaves(tree: Mapping[str, Any], depth: int) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if is_mapping(value) and value and depth > 1:
            yield from ((f"{key}.{name}", leaf) for name, leaf in _leaves(value, depth - 1))
        else:
            yield str(key), value


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def _part(shapes: Mapping[str, tuple[int, ...]]) -> tuple[Part, str]:
    for pattern, part, layout in _PARTS:
        match = re.compile(pattern).match
        if any(match(key) for key in shapes):
            alone = compvis_parts(shapes)
            return (alone[0] if part == "model" and len(alone) == 1 else part), layout
    return "", ""


def ema_key(key: str) -> str:
    """The key of the moving average of the weight `key`: the name after `model.` with all dots removed."""
    return EMA_PREFIX + key.removeprefix("model.").replace(".", "")


def compvis_parts(keys: Collection[str]) -> list[Part]:
    """The parts of a model that keys in CompVis's layout are of; moving averages count as a U-Net's weights."""
    averages = ema_key(COMPVIS_PREFIXES["U-Net"])
    return [
        part
        for part, prefix in COMPVIS_PREFIXES.items()
        if any(key.startswith(prefix) or (part == "U-Net" and key.startswith(averages)) for key in keys)
    ]


def _family(shapes: Mapping[str, tuple[int, ...]]) -> str:
    if any(key.startswith("conditioner.embedders.") for key in shapes):
        return SDXL
    if any(key.startswith(f"{COND_STAGE_PREFIX}model.transformer.resblocks.") for key in shapes):
        return V2
    reads = _FAMILIES.get(_size(shapes, r"attn2\.?to_k\.?weight$"), "")
    return reads or _TEXT_WIDTHS.get(_size(shapes, r"\.token_embedding\.weight$"), "")


def _kind_of_one_tensor(shapes: Mapping[str, tuple[int, ...]]) -> ModelKind:
    """An embedding is also a single tensor under its word; SDXL's has one for each text encoder."""
    if set(shapes) == {"clip_l", "clip_g"}:
        return ModelKind("embedding", SDXL)
    family = (
        _TEXT_WIDTHS.get(_size(shapes, "")) if len(shapes) == 1 and _size(shapes, "", axis=2) == 0 else None
    )
    return ModelKind("embedding", family, "", "diffusers") if family else ModelKind("")


def _flavour(shapes: Mapping[str, tuple[int, ...]]) -> str:
    if any(re.match(r"(lora|lycoris|oft|te1?)_", key) for key in shapes):
        style = "kohya"
    else:
        style = "PEFT" if any(".lora_A." in key for key in shapes) else "diffusers"
    return " ".join([style, *(name for part, name in _METHODS if any(part in key for key in shapes))])


def family_by_key(keys: Collection[str]) -> str:
    """The model other than v1 that an adapter is for, by layers that only that model has; empty without any."""
    return next((name for name, pattern in _ADAPTED if any(map(pattern.match, keys))), "")


def _family_of_adapter(shapes: Mapping[str, tuple[int, ...]]) -> str:
    if other := family_by_key(shapes):
        return other
    down = r".*(down\.weight|lora_A\.weight|hada_w1_b)$"
    text = r"(lora_te|text_encoder|text_model).*q_proj" + down
    read = _size(shapes, r"attn2(_|\.|\.processor\.)to_k(_lora)?\b" + down, axis=1)
    return _FAMILIES.get(read) or _TEXT_WIDTHS.get(_size(shapes, text, axis=1), "")


def _size(shapes: Mapping[str, tuple[int, ...]], pattern: str, axis: int = -1) -> int:
    """The size along `axis` of the first tensor that has one and whose key holds `pattern`; 0 without any."""
    found = (shape for key, shape in shapes.items() if len(shape) > max(axis, 0) and re.search(pattern, key))
    return next((shape[axis] for shape in found), 0)


def other_model(kind: ModelKind) -> str | None:
    """The name of a kind that is not a whole Stable Diffusion v1 model, such as "SDXL"; else None.

    A v1 model for inpainting or edits counts as another model too: it needs its own config.
    """
    fits = kind.part in ("model", "U-Net") and kind.layout == "CompVis" and not kind.variant
    if kind.part == "" or (fits and kind.family in (V1, LAION, "")):
        return None
    if kind.variant in _CONFIGS and kind.family in (V1, ""):
        return f"{kind.name}, which needs the {_CONFIGS[kind.variant]} config"
    return kind.name


def input_variant(state_dict: Mapping[str, torch.Tensor]) -> str:
    """The U-Net's other inputs, as in `ModelKind.variant`, by its input channels."""
    key = f"{COMPVIS_PREFIXES['U-Net']}input_blocks.0.0.weight"
    first = state_dict.get(key, state_dict.get(ema_key(key), torch.empty(0)))
    return _VARIANTS.get(first.shape[1], "") if first.ndim >= 2 else ""


def is_laion_model(state_dict: Mapping[str, torch.Tensor]) -> bool:
    """Whether the text encoder is that of LDM text2img-large (LAION-400M), a BERT, and not CLIP's."""
    return _LAION_KEY in state_dict


def count_and_names(keys: Collection[str]) -> str:
    """For messages: "7 keys (a, b, c, d, e, ...)", the first five of them by name."""
    more = ", ..." if len(keys) > _NAMED else ""
    names = ", ".join(printable(key[:200]) for key in itertools.islice(keys, _NAMED))
    return f"{len(keys)} {'keys' if len(keys) != 1 else 'key'} ({names}{more})"


def looks_like(kind: ModelKind) -> str:
    """A clause for an error message, such as "; it looks like SDXL, this toolkit runs ..."; often empty."""
    other = (
        None if kind.part in ("ControlNet", "T2I-Adapter", "IP-Adapter") else other_model(kind)
    )  # which are read as such
    return f"; it looks like {other}, and this toolkit runs Stable Diffusion v1" if other else ""
