"""State dicts are recognised by the keys and shapes of published files and of the libraries that write them."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from ldm.checkpoints.formats.read import Checkpoint
from ldm.checkpoints.layouts.recognise import (
    LAION,
    SDXL,
    V1,
    V2,
    ModelKind,
    count_and_names,
    is_laion_model,
    kind_of,
    looks_like,
    other_model,
    tensors_in,
)
from ldm.checkpoints.load import skip_init
from tests.support.golden_data import keys

UNET = "model.diffusion_model."
ATTENTION = f"{UNET}input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
FIRST = f"{UNET}input_blocks.0.0.weight"
DOWN = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
THEIRS = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
TOWER = "text_model.encoder.layers.0.self_attn.q_proj"


def of_shapes(shapes: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


def compvis(**shapes: Any) -> dict[str, Any]:
    """Keys of a whole model in CompVis's layout, with others added."""
    whole = {
        FIRST: (320, 4, 3, 3),
        "first_stage_model.decoder.conv_in.bias": (1,),
        "cond_stage_model.x": (1,),
    }
    return {**whole, **shapes}


PUBLISHED = [
    ("keys_v1.json", ModelKind("model", V1, "", "CompVis"), "Stable Diffusion v1"),
    ("keys_v1_ema.json", ModelKind("model", V1, "", "CompVis"), "Stable Diffusion v1"),
    ("keys_inpaint.json", ModelKind("model", V1, "inpainting", "CompVis"), "Stable Diffusion v1 inpainting"),
    ("keys_laion400m.json", ModelKind("model", LAION, "", "CompVis"), "LDM text2img-large (LAION-400M)"),
]


def test_a_model_that_edits_needs_its_config() -> None:
    kind = kind_of(of_shapes(compvis(**{ATTENTION: (640, 768), FIRST: (320, 8, 3, 3)})))
    assert kind == ModelKind("model", V1, "InstructPix2Pix", "CompVis")
    assert other_model(kind) == "Stable Diffusion v1 InstructPix2Pix, which needs the edit config"


@pytest.mark.parametrize(("name", "kind", "text"), PUBLISHED, ids=[row[0] for row in PUBLISHED])
def test_the_models_that_this_toolkit_runs(name: str, kind: ModelKind, text: str) -> None:
    found = kind_of(of_shapes(dict(keys(name))))
    assert found == kind and found.name == text
    other = f"{text}, which needs the inpainting config" if kind.variant else None
    assert other_model(kind_of(of_shapes(dict(keys(name))))) == other


@pytest.mark.parametrize(
    ("prefix", "part"),
    [
        (UNET, "U-Net"),
        ("first_stage_model.", "autoencoder"),
        ("cond_stage_model.", "text encoder"),
    ],
)
@pytest.mark.parametrize("bare", [False, True])
def test_a_part_of_a_published_model_alone(prefix: str, part: str, bare: bool) -> None:
    shapes = {
        key.removeprefix(prefix if bare else ""): shape
        for key, shape in keys("keys_v1.json").items()
        if key.startswith(prefix)
    }
    if bare and part == "text encoder":
        shapes = {key.removeprefix("transformer."): shape for key, shape in shapes.items()}
    found = kind_of(of_shapes(shapes))
    assert found.part == part and found.family == ("" if part == "autoencoder" else V1)


OTHERS = [
    (compvis(**{ATTENTION: (640, 1024)}), "Stable Diffusion v2"),
    ({"cond_stage_model.model.transformer.resblocks.0.ln_1.weight": (1024,)},
     "a text encoder alone for Stable Diffusion v2"),
    (compvis(**{ATTENTION: (640, 1024), FIRST: (320, 9, 3, 3)}), "Stable Diffusion v2 inpainting"),
    (compvis(**{ATTENTION: (640, 1024), FIRST: (320, 5, 3, 3)}), "Stable Diffusion v2 depth"),
    (compvis(**{ATTENTION: (640, 2048), "conditioner.embedders.0.transformer.x": (1,)}), "SDXL"),
    ({"conditioner.embedders.0.transformer.text_model.x": (1,)}, "SDXL"),
    (compvis(**{ATTENTION: (64, 192)}), "a latent diffusion model"),
    ({"control_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 768)},
     "a ControlNet for Stable Diffusion v1"),
    ({"controlnet_cond_embedding.conv_in.weight": (16, 3, 3, 3), f"{THEIRS}.to_k.weight": (320, 768)},
     "a ControlNet for Stable Diffusion v1 in the diffusers layout"),
    ({"conv_in.weight": (320, 9, 3, 3), f"{THEIRS}.to_k.weight": (320, 768)},
     "a U-Net alone for Stable Diffusion v1 inpainting in the diffusers layout"),
    ({f"{THEIRS}.to_k.weight": (640, 2048)}, "a U-Net alone for SDXL in the diffusers layout"),
    ({"encoder.down.0.block.0.norm1.weight": (128,)}, "an autoencoder (VAE) alone"),
    ({"decoder.up_blocks.0.resnets.0.norm1.weight": (128,)},
     "an autoencoder (VAE) alone in the diffusers layout"),
    ({f"{TOWER}.weight": (768, 768), "text_model.embeddings.token_embedding.weight": (49408, 768)},
     "a text encoder alone for Stable Diffusion v1 in the diffusers layout"),
    ({"vision_model.vision_model.post_layernorm.bias": (1024,), "concept_embeds": (17, 768)},
     "a safety checker in the diffusers layout"),
    ({f"{DOWN}.lora_down.weight": (4, 768), f"{DOWN}.lora_up.weight": (320, 4), f"{DOWN}.alpha": ()},
     "a LoRA for Stable Diffusion v1 in the kohya layout"),
    ({f"{DOWN}.lora_down.weight": (4, 1024)}, "a LoRA for Stable Diffusion v2 in the kohya layout"),
    ({f"{DOWN}.lora_down.weight": (4, 2048)}, "a LoRA for SDXL in the kohya layout"),
    ({"lora_te1_text_model_x.alpha": (), "lora_te2_text_model_x.alpha": ()}, "a LoRA for SDXL in the kohya layout"),
    ({"lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight": (4, 768)},
     "a LoRA for Stable Diffusion v1 in the kohya layout"),
    ({f"{DOWN}.hada_w1_a": (320, 4), f"{DOWN}.hada_w1_b": (4, 768)},
     "a LoRA for Stable Diffusion v1 in the kohya LoHa layout"),
    ({f"{DOWN}.lokr_w1": (4, 4)}, "a LoRA in the kohya LoKr layout"),
    ({f"{DOWN}.lora_down.weight": (4, 768), f"{DOWN}.dora_scale": (1, 768)},
     "a LoRA for Stable Diffusion v1 in the kohya DoRA layout"),
    ({f"unet.{THEIRS}.processor.to_k_lora.down.weight": (4, 768)},
     "a LoRA for Stable Diffusion v1 in the diffusers layout"),
    ({f"unet.{THEIRS}.to_k.lora_A.weight": (4, 768)}, "a LoRA for Stable Diffusion v1 in the PEFT layout"),
    ({f"base_model.model.{THEIRS}.to_k.lora_A.weight": (4, 768)},
     "a LoRA for Stable Diffusion v1 in the PEFT layout"),
    ({f"text_encoder.{TOWER}.lora_linear_layer.down.weight": (4, 768)},
     "a LoRA for Stable Diffusion v1 in the diffusers layout"),
    ({"emb_params": (3, 768)}, "a textual inversion embedding for Stable Diffusion v1 in the kohya layout"),
    ({"<cat-toy>": (768,)}, "a textual inversion embedding for Stable Diffusion v1 in the diffusers layout"),
    ({"<cat-toy>": (2, 1024)}, "a textual inversion embedding for Stable Diffusion v2 in the diffusers layout"),
    ({"clip_l": (2, 768), "clip_g": (2, 1280)}, "a textual inversion embedding for SDXL"),
    ({"some.weight": (768, 3, 3)}, "an unknown state dict"),
    ({"a": (768,), "b": (768,)}, "an unknown state dict"),
    ({}, "an unknown state dict"),
]  # fmt: skip


@pytest.mark.parametrize(("shapes", "name"), OTHERS, ids=[row[1][:40] for row in OTHERS])
def test_other_files_are_named(shapes: dict[str, Any], name: str) -> None:
    assert kind_of(of_shapes(shapes)).name == name
    told = f"{name}, which needs the inpainting config" if "v1 inpainting" in name else name
    unsure = "a latent diffusion model", "an unknown state dict"
    assert other_model(kind_of(of_shapes(shapes))) == (None if name in unsure else told)


def test_an_embedding_as_its_training_left_it() -> None:
    tree = {"string_to_token": {"*": 265}, "string_to_param": {"*": torch.zeros(2, 768)}, "name": "cat"}
    assert kind_of(tree) == ModelKind("embedding", V1, "", "A1111")


@pytest.mark.parametrize("library_config", [(768, V1), (1024, V2), (2048, SDXL)])
def test_a_u_net_that_diffusers_builds(library_config: tuple[int, str]) -> None:
    diffusers = pytest.importorskip("diffusers")
    width, family = library_config
    with torch.device("meta"), skip_init():
        unet = diffusers.UNet2DConditionModel(
            block_out_channels=(32, 32), cross_attention_dim=width, norm_num_groups=8, layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )  # fmt: skip
    assert kind_of(unet.state_dict()) == ModelKind("U-Net", family, "", "diffusers")


def test_the_refusal_names_the_other_model() -> None:
    file = Checkpoint("x", "safetensors", of_shapes({"emb_params": (3, 768)}))  # type: ignore[arg-type]
    clause = looks_like(file.kind)
    assert re.fullmatch(
        r"; it looks like a textual inversion .*, and this toolkit runs Stable Diffusion v1", clause
    )
    assert looks_like(kind_of(of_shapes(dict(keys("keys_v1.json"))))) == ""


def test_a_mapping_that_occurs_in_many_places_is_visited_a_bounded_number_of_times() -> None:
    tree: dict[str, Any] = {}
    for _ in range(40):
        tree = {str(i): tree for i in range(1000)}
    assert sum(1 for _ in tensors_in(tree)) == 100_000, "1000 ** 3 visits would take minutes"
    assert kind_of(tree).part == ""


@pytest.mark.parametrize("name", [row[0] for row in PUBLISHED])
def test_the_text_model_tells_the_laion_model(name: str) -> None:
    assert is_laion_model(of_shapes(dict(keys(name)))) == (name == "keys_laion400m.json")


def test_keys_are_counted_and_a_few_named() -> None:
    assert count_and_names(["a\x1b"]) == r"1 key (a\x1b)"
    assert count_and_names(dict.fromkeys("abcdefg")) == "7 keys (a, b, c, d, e, ...)"
    assert count_and_names(["x" * 300]) == f"1 key ({'x' * 200})"


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("down_blocks.0.motion_modules.0.temporal_transformer.norm.weight", "a motion module (AnimateDiff)"),
        ("image_proj.proj.weight", "an IP-Adapter"),
        ("ip_adapter.1.to_k_ip.weight", "an IP-Adapter"),
        ("adapter.body.0.resnets.0.block1.weight", "a T2I-Adapter"),
        ("body.0.block1.weight", "a T2I-Adapter"),
        ("model.1.sub.0.RDB1.conv1.0.weight", "an upscaler (ESRGAN)"),
        ("down_blocks.0.attentions.0.transformer_blocks.0.attn2.processor.to_k_ip.weight", "an IP-Adapter"),
        ("adapter.body.0.in_conv.weight", "a T2I-Adapter"),
        ("input_hint_block.0.weight", "a ControlNet"),
        ("zero_convs.0.0.weight", "a ControlNet"),
        ("controlnet_down_blocks.0.weight", "a ControlNet in the diffusers layout"),
        ("lora_controlnet", "a ControlNet"),
        ("activation_func", "a hypernetwork"),
        ("vision_model.encoder.layers.0.mlp.fc1.weight", "an image encoder (of CLIP) alone"),
        ("positional_embedding", "a CLIP under OpenAI's names"),
        ("down_blocks.0.0.channelwise.0.weight", "an unknown state dict"),
        ("down_blocks.0.ctrl_to_base.0.weight", "an unknown state dict"),
        ("backbone.stem.weight", "an unknown state dict"),
    ],
)
def test_files_beside_a_model_are_named_as_what_they_are(key, name):
    """Also next to layers that a U-Net has, under the names of either layout."""
    assert kind_of({key: torch.zeros(320)}).name == name
    if name != "an unknown state dict" and "alone" not in name:
        layers = {
            f"{THEIRS}.to_q.weight",
            "down_blocks.0.resnets.0.norm1.weight",
            "input_blocks.1.0.in_layers.0.weight",
        }
        assert (
            kind_of({**dict.fromkeys(layers, torch.zeros(3)), key: torch.zeros(320)}).part
            == kind_of({key: torch.zeros(320)}).part
        )
