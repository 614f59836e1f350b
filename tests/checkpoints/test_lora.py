"""LoRA files against closed forms in NumPy, under every name that programs give their keys."""

import hashlib
import json
import logging
import os

import numpy as np
import pytest
import torch

from ldm.checkpoints import hashing
from ldm.checkpoints.adapters.lora import LoraStack, read_lora
from ldm.checkpoints.adapters.lora_files import LoraFiles, lora_file, lora_hash
from ldm.checkpoints.adapters.lora_names import TEXT, UNET, Key, flat_name, layers_by_name, split_key
from ldm.checkpoints.formats.detect import CheckpointError
from ldm.checkpoints.layouts.recognise import family_by_key, kind_of
from ldm.checkpoints.load import skip_init
from ldm.config import read_config
from ldm.runs.settings import file_digest
from ldm.util import InputError, instantiate_from_config
from tests.support.golden_data import inpainting_config, tiny_model

safetensors = pytest.importorskip("safetensors.torch")

# one layer of every kind: its kohya name, its path in the model, and the shape of its weight in the tiny model
QUERY = ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
         "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q")  # fmt: skip
OUT = ("lora_unet_up_blocks_3_attentions_2_transformer_blocks_0_attn2_to_out_0",
       "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.attn2.to_out.0")  # fmt: skip
KERNEL = ("lora_unet_down_blocks_1_resnets_1_conv2", "model.diffusion_model.input_blocks.5.0.out_layers.3")
POINT = ("lora_unet_mid_block_attentions_0_proj_in", "model.diffusion_model.middle_block.1.proj_in")
NORM = ("lora_unet_up_blocks_0_resnets_0_norm1", "model.diffusion_model.output_blocks.0.0.in_layers.0")
WORDS = ("lora_te_text_model_encoder_layers_1_self_attn_v_proj",
         "cond_stage_model.transformer.text_model.encoder.layers.1.self_attn.v_proj")  # fmt: skip
FIRST = ("lora_unet_conv_in", "model.diffusion_model.input_blocks.0.0")


@pytest.fixture(scope="module")
def whole():
    return tiny_model()


@pytest.fixture
def model(whole):
    """The tiny model, which has its own parameters again after each test."""
    own = {module: dict(module._parameters) for module in whole.modules()}
    yield whole
    for module, parameters in own.items():
        module._parameters.update(parameters)


@pytest.fixture
def save(tmp_path):
    """Writes a safetensors file from arrays."""

    def save(tensors, metadata=None, name="x.safetensors"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {key: torch.tensor(np.asarray(value)) for key, value in tensors.items()}
        safetensors.save_file(tensors, path, metadata)
        return path

    return save


def normal(*shape, seed=0):
    return np.random.RandomState(seed + sum(shape)).standard_normal(shape).astype(np.float32) / 4


def weight_of(model, layer):
    return model.get_parameter(f"{layer}.weight").detach().numpy()


def low_rank(name, weight, rank=3, seed=0):
    """The factors of a change, as kohya writes them without alpha."""
    return {
        f"{name}.lora_down.weight": normal(rank, *weight.shape[1:], seed=seed),
        f"{name}.lora_up.weight": normal(len(weight), rank, *[1] * (weight.ndim - 2), seed=seed + 1),
    }


def product(tensors, name):
    """up @ down, kernel position by kernel position."""
    down, up = tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"]
    return np.einsum("or,r...->o...", up.reshape(len(up), -1), down)


def change_of(model, path, layer, weight=1.0):
    """The change of a layer's weight by a file."""
    before = weight_of(model, layer).copy()
    stack = LoraStack(model)
    stack.apply([(str(path), weight, weight)])
    after = weight_of(model, layer).copy()
    stack.apply([])
    assert np.array_equal(weight_of(model, layer), before)
    return after - before


def close(actual, expected):
    return np.allclose(actual, expected, rtol=1e-5, atol=2e-6)


# --- the mathematics ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, layer", [QUERY, OUT, KERNEL, POINT, WORDS])
def test_low_rank(model, save, name, layer):
    tensors = low_rank(name, weight_of(model, layer))
    expected = product(tensors, name)
    assert close(change_of(model, save(tensors), layer), expected)
    with_alpha = save({**tensors, f"{name}.alpha": np.float32(6)})
    assert close(change_of(model, with_alpha, layer, 0.5), 0.5 * 6 / 3 * expected)
    halved = save({key: value.astype(np.float16) for key, value in tensors.items()})
    assert np.allclose(change_of(model, halved, layer), expected, atol=2e-2)


def test_a_point_convolution_comes_as_a_matrix_too(model, save):
    name, layer = POINT
    weight = weight_of(model, layer)
    four = low_rank(name, weight)
    two = {key: value.reshape(value.shape[:2]) for key, value in four.items()}
    assert np.array_equal(change_of(model, save(four), layer), change_of(model, save(two), layer))


def test_tucker_convolution(model, save):
    name, layer = KERNEL
    out, into, *kernel = weight_of(model, layer).shape
    up, mid, down = normal(out, 3, 1, 1), normal(3, 2, *kernel), normal(2, into, 1, 1)
    path = save({f"{name}.lora_{part}.weight": t for part, t in (("up", up), ("mid", mid), ("down", down))})
    expected = sum(
        up[:, a, 0, 0, None, None, None] * mid[a, b] * down[b, :, 0, 0, None, None]
        for a in range(3)
        for b in range(2)
    )
    assert close(change_of(model, path, layer), expected)


def test_hadamard_product(model, save):
    name, layer = QUERY
    out, into = weight_of(model, layer).shape
    parts = {
        "w1_a": normal(out, 4),
        "w1_b": normal(4, into),
        "w2_a": normal(out, 4, seed=1),
        "w2_b": normal(4, into, seed=1),
    }
    path = save({f"{name}.hada_{key}": t for key, t in parts.items()} | {f"{name}.alpha": np.float32(2)})
    expected = 2 / 4 * (parts["w1_a"] @ parts["w1_b"]) * (parts["w2_a"] @ parts["w2_b"])
    assert close(change_of(model, path, layer), expected)


def test_hadamard_product_of_kernels(model, save):
    name, layer = KERNEL
    out, into, *kernel = weight_of(model, layer).shape
    flat = {"w1_a": normal(out, 2), "w1_b": normal(2, into * 9), "w2_a": normal(out, 2, seed=1), "w2_b": normal(2, into * 9, seed=1)}  # fmt: skip # noqa: E501
    expected = (flat["w1_a"] @ flat["w1_b"] * (flat["w2_a"] @ flat["w2_b"])).reshape(out, into, *kernel)
    assert close(change_of(model, save({f"{name}.hada_{k}": t for k, t in flat.items()}), layer), expected)

    tucker = {f"w{i}_a": normal(2, out, seed=i) for i in (1, 2)} | {
        f"w{i}_b": normal(2, into, seed=i) for i in (1, 2)
    }
    tucker |= {f"t{i}": normal(2, 2, *kernel, seed=i) for i in (1, 2)}
    one, two = (
        sum(
            tucker[f"t{i}"][a, b] * (tucker[f"w{i}_a"][a][:, None] * tucker[f"w{i}_b"][b])[:, :, None, None]
            for a in range(2)
            for b in range(2)
        )
        for i in (1, 2)
    )
    path = save({f"{name}.hada_{k}": t for k, t in tucker.items()})
    assert close(change_of(model, path, layer), one * two)


@pytest.mark.parametrize("first", ["whole", "factors"])
@pytest.mark.parametrize("second", ["whole", "factors"])
def test_kronecker_product(model, save, first, second):
    name, layer = QUERY
    out, into = weight_of(model, layer).shape
    w1 = (
        {"lokr_w1": normal(4, 4)}
        if first == "whole"
        else {"lokr_w1_a": normal(4, 2), "lokr_w1_b": normal(2, 4)}
    )
    shape = out // 4, into // 4
    w2 = {"lokr_w2": normal(*shape)} if second == "whole" else {"lokr_w2_a": normal(shape[0], 2), "lokr_w2_b": normal(2, shape[1])}  # fmt: skip # noqa: E501
    left = w1.get("lokr_w1") if first == "whole" else w1["lokr_w1_a"] @ w1["lokr_w1_b"]
    right = w2["lokr_w2"] if second == "whole" else w2["lokr_w2_a"] @ w2["lokr_w2_b"]
    scale = 1 if (first, second) == ("whole", "whole") else 8 / 2
    path = save({f"{name}.{key}": t for key, t in (w1 | w2).items()} | {f"{name}.alpha": np.float32(8)})
    assert close(change_of(model, path, layer), scale * np.kron(left, right))


def test_kronecker_product_of_kernels(model, save):
    name, layer = KERNEL
    out, into, *kernel = weight_of(model, layer).shape
    w1, w2 = normal(2, 2), normal(out // 2, into // 2, *kernel)
    expected = np.einsum("ab,cdhw->acbdhw", w1, w2).reshape(out, into, *kernel)
    assert close(change_of(model, save({f"{name}.lokr_w1": w1, f"{name}.lokr_w2": w2}), layer), expected)
    a, b = normal(out // 2, 2), normal(2, into // 2 * 9)
    expected = np.einsum("ab,cdhw->acbdhw", w1, (a @ b).reshape(w2.shape)).reshape(out, into, *kernel)
    factors = {f"{name}.lokr_w1": w1, f"{name}.lokr_w2_a": a, f"{name}.lokr_w2_b": b}
    assert close(change_of(model, save(factors), layer), expected)
    t, a, b = normal(2, 2, *kernel), normal(2, out // 2), normal(2, into // 2)
    core = np.einsum("ijhw,io,jn->onhw", t, a, b)
    expected = np.einsum("ab,cdhw->acbdhw", w1, core).reshape(out, into, *kernel)
    factors = {f"{name}.lokr_w1": w1, f"{name}.lokr_w2_a": a, f"{name}.lokr_w2_b": b, f"{name}.lokr_t2": t}
    assert close(change_of(model, save(factors), layer), expected)


def test_full_differences_of_weights_biases_and_norms(model, save):
    (out, out_layer), (norm, norm_layer) = OUT, NORM
    diff, bias = (
        normal(*weight_of(model, out_layer).shape),
        normal(len(weight_of(model, out_layer))),
    )
    scale, shift = (normal(len(weight_of(model, norm_layer)), seed=i) for i in (1, 2))
    path = save(
        {f"{out}.diff": diff, f"{out}.diff_b": bias, f"{norm}.w_norm": scale, f"{norm}.b_norm": shift}
    )
    before = {key: value.clone() for key, value in model.state_dict().items()}
    LoraStack(model).apply([(str(path), 2.0, 1.0)])
    changed = {
        key: (value - before[key]).numpy()
        for key, value in model.state_dict().items()
        if not torch.equal(value, before[key])
    }
    expected = {f"{out_layer}.weight": diff, f"{out_layer}.bias": bias, f"{norm_layer}.weight": scale,
                f"{norm_layer}.bias": shift}  # fmt: skip
    assert changed.keys() == expected.keys()
    assert all(close(changed[key], 2 * expected[key]) for key in expected)


@pytest.mark.parametrize("name, layer", [QUERY, KERNEL])
@pytest.mark.parametrize("axis", [0, 1], ids=["rows", "columns"])
def test_magnitude_and_direction_apart(model, save, name, layer, axis):
    weight = weight_of(model, layer).copy()
    tensors = low_rank(name, weight)
    sides = [1] * weight.ndim
    sides[axis] = weight.shape[axis]
    magnitude = 1 + normal(*sides)
    path = save({**tensors, f"{name}.dora_scale": magnitude, f"{name}.alpha": np.float32(1.5)})
    changed = weight + 1.5 / 3 * product(tensors, name)
    others = tuple(i for i in range(weight.ndim) if i != axis)
    expected = magnitude * changed / np.sqrt((changed.astype(np.float64) ** 2).sum(others, keepdims=True))
    assert close(change_of(model, path, layer), expected - weight)
    assert close(change_of(model, path, layer, 0.25), 0.25 * (expected - weight))


def test_peft_names_the_magnitudes_of_rows_otherwise(model, save):
    name, layer = QUERY
    weight = weight_of(model, layer)
    tensors = low_rank(name, weight)
    magnitude = 1 + normal(len(weight))
    ours = change_of(model, save({**tensors, f"{name}.dora_scale": magnitude[:, None]}), layer)
    theirs = save({**tensors, f"{name}.lora_magnitude_vector": magnitude}, name="y.safetensors")
    assert np.array_equal(ours, change_of(model, theirs, layer))


def test_a_change_of_four_input_channels_is_padded_for_nine(save):
    model = tiny_model(inpainting_config())
    name, layer = FIRST
    out, _, *kernel = weight_of(model, layer).shape
    tensors = low_rank(name, np.empty((out, 4, *kernel)))
    change = change_of(model, save(tensors), layer)
    assert close(change[:, :4], product(tensors, name))
    assert change.shape[1] == 9 and not change[:, 4:].any()


# --- names ----------------------------------------------------------------------------------------------------------


def spellings():
    """The query layer's and the text layer's keys in the styles of other programs; `{}` is down or up."""
    unet = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    sgm = "input_blocks.1.1.transformer_blocks.0.attn1.to_q"
    text = "text_model.encoder.layers.1.self_attn"
    return {
        "kohya": (f"{QUERY[0]}.lora_{{}}.weight", f"{WORDS[0]}.lora_{{}}.weight"),
        "te1": (f"{QUERY[0]}.lora_{{}}.weight", f"{WORDS[0].replace('te_', 'te1_')}.lora_{{}}.weight"),
        "sgm": (f"lora_unet_{sgm.replace('.', '_')}.lora_{{}}.weight", f"{WORDS[0]}.lora_{{}}.weight"),
        "generic": (f"diffusion_model.{sgm}.lora_{{AB}}.weight", f"text_encoder.{text}.v_proj.lora_{{AB}}.weight"),
        "lycoris": (f"lycoris_{QUERY[0][len('lora_unet_') :]}.lora_{{}}.weight", f"{WORDS[0]}.lora_{{}}.weight"),
        "old": (
            f"unet.{unet}.processor.to_q_lora.{{}}.weight",
            f"text_encoder.{text}.v_proj.lora_linear_layer.{{}}.weight",
        ),
        "older text": (f"unet.{unet}.to_q.lora.{{}}.weight", f"text_encoder.{text}.to_v_lora.{{}}.weight"),
        "no outer level": (
            f"unet.{unet}.to_q.lora_{{AB}}.weight",
            f"text_encoder.{text.removeprefix('text_model.')}.v_proj.lora_{{AB}}.weight",
        ),
        "peft": (
            f"base_model.model.{unet}.to_q.lora_{{AB}}.weight",
            f"base_model.model.{text}.v_proj.lora_{{AB}}.weight",
        ),
        "compiled": (
            f"unet._orig_mod.{unet}.to_q.lora_{{AB}}.weight",
            f"text_encoder._orig_mod.{text}.v_proj.lora_{{AB}}.weight",
        ),
        "parallel": (f"module.{unet}.to_q.lora_{{AB}}.weight", f"module.{text}.v_proj.lora_{{AB}}.weight"),
        **{
            prefix: (f"diffusion_model.{sgm}.lora_{{}}.weight", f"{prefix}{text}.v_proj.lora_{{}}.weight")
            for prefix in (
                "text_encoders.clip_l.transformer.", "text_encoders.clip_l.", "clip_l.transformer.", "clip_l.",
                "cond_stage_model.transformer.", "cond_stage_model.",
            )
        },
        **{
            prefix: (
                f"lora_unet_{sgm.replace('.', '_')}.lora_{{}}.weight",
                f"{prefix}{text.replace('.', '_')}_v_proj.lora_{{}}.weight",
            )
            for prefix in ("te_", "te1_", "lycoris_text_encoder_", "lora_te1_")
        },
    }  # fmt: skip


@pytest.mark.parametrize("style", spellings())
def test_one_file_in_the_styles_of_all_programs(model, save, style, caplog):
    tensors = {}
    for (name, layer), key in zip((QUERY, WORDS), spellings()[style], strict=True):
        factors = low_rank(name, weight_of(model, layer))
        for part, letter in (("down", "A"), ("up", "B")):
            tensors[key.format(part, AB=letter)] = factors[f"{name}.lora_{part}.weight"]
    path = save(tensors)
    for name, layer in (QUERY, WORDS):
        factors = low_rank(name, weight_of(model, layer))
        assert close(change_of(model, path, layer), product(factors, name))
    assert not caplog.records


@pytest.fixture(scope="module")
def v1():
    with torch.device("meta"), skip_init():
        return instantiate_from_config(read_config("configs/stable-diffusion/v1-inference.yaml"))


@pytest.mark.long
def test_every_layer_of_v1_has_its_kohya_name(v1):
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"), skip_init():
        unet = diffusers.UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
    layers = layers_by_name(v1)
    kinds = torch.nn.Linear, torch.nn.Conv2d
    named = {f"lora_unet_{p.replace('.', '_')}": m for p, m in unet.named_modules() if isinstance(m, kinds)}
    assert (
        len(named) == 282 and sum("attentions" in name for name in named) == 192
    )  # kohya trains these by default
    for name, module in named.items():
        own = v1.get_submodule(layers[flat_name(name)])
        assert own.weight.numel() == module.weight.numel() and own.weight.shape[:2] == module.weight.shape[:2]
        assert layers[flat_name(name)].startswith(UNET)
    text = [
        f"lora_te_text_model_encoder_layers_{i}_{part}"
        for i in range(12)
        for part in (*(f"self_attn_{p}_proj" for p in ("q", "k", "v", "out")), "mlp_fc1", "mlp_fc2")
    ]
    found = {layers[flat_name(name)] for name in text}
    assert len(found) == 72 and all(layer.startswith(TEXT) for layer in found)
    assert len({layers[flat_name(name)] for name in (*named, *text)}) == 282 + 72


def test_settings_of_peft_give_alpha(model, save):
    layer = QUERY[1]
    path = f"base_model.model.{'down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q'}"
    factors = low_rank("x", weight_of(model, layer))
    tensors = {f"{path}.lora_A.weight": factors["x.lora_down.weight"], f"{path}.lora_B.weight": factors["x.lora_up.weight"]}  # fmt: skip # noqa: E501
    plain = product(factors, "x")
    file = save(tensors, name="mine/adapter_model.safetensors")
    for settings, scale in (
        ({"r": 3, "lora_alpha": 6}, 2),
        ({"r": 3, "lora_alpha": 6, "use_rslora": True}, 6 / 3**0.5),
        ({"r": 3, "lora_alpha": 6, "alpha_pattern": {"attn1.to_q": 12, "tn1.to_q": 99}}, 4),
    ):
        file.with_name("adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **settings}))
        assert close(change_of(model, file.parent, layer), scale * plain)
    noted = {f"unet.{key.removeprefix('base_model.model.')}": t for key, t in tensors.items()}
    header = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 9, "unet.r": 3})}
    assert close(change_of(model, save(noted, header), layer), 3 * plain)
    for settings in (
        {"peft_type": "LOHA"},
        {"fan_in_fan_out": True},
        [1],
        {"lora_alpha": "x"},
        {"lora_alpha": 1, "alpha_pattern": {"to_q": [1]}},
        {"lora_alpha": float("nan")},
    ):
        file.with_name("adapter_config.json").write_text(json.dumps(settings))
        with pytest.raises(CheckpointError):
            change_of(model, file, layer)


def test_settings_of_20_gb_are_refused_by_their_size(model, save, monkeypatch):
    layer = QUERY[1]
    factors = low_rank("x", weight_of(model, layer))
    path = "base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    file = save(
        {
            f"{path}.lora_A.weight": factors["x.lora_down.weight"],
            f"{path}.lora_B.weight": factors["x.lora_up.weight"],
        },
        name="mine/adapter_model.safetensors",
    )
    settings = file.with_name("adapter_config.json")
    settings.touch()
    os.truncate(settings, 20 * 2**30)
    monkeypatch.setattr(hashing, "_digest", lambda path: pytest.fail(f"{path} is read as a whole"))
    for use in (lambda: change_of(model, file.parent, layer), lambda: file_digest(settings)):
        with pytest.raises(InputError, match=r"adapter_config\.json is larger than 16 MB"):
            use()


# --- on and off -----------------------------------------------------------------------------------------------------


def test_taking_it_off_gives_the_same_parameters_back(model, save):
    path = str(save(low_rank(*_named(model, QUERY)) | low_rank(*_named(model, WORDS))))
    own = dict(model.named_parameters())
    before = {key: value.clone() for key, value in own.items()}
    stack = LoraStack(model)
    assert stack.apply([(path, 1.0, 1.0)])
    carried = dict(model.named_parameters())
    new = {key for key in own if carried[key] is not own[key]}
    assert new == {f"{QUERY[1]}.weight", f"{WORDS[1]}.weight"}
    assert not stack.apply([(path, 1.0, 1.0)])
    assert all(parameter is carried[key] for key, parameter in model.named_parameters())
    assert not stack.apply([(path, 0.5, 1.0)])  # the text encoder keeps its weights
    assert model.get_parameter(f"{WORDS[1]}.weight") is carried[f"{WORDS[1]}.weight"]
    assert model.get_parameter(f"{QUERY[1]}.weight") is not carried[f"{QUERY[1]}.weight"]
    assert stack.apply([(path, 0.0, 0.0)])
    assert all(
        parameter is own[key] and torch.equal(parameter, before[key])
        for key, parameter in model.named_parameters()
    )


def _named(model, layer):
    return layer[0], weight_of(model, layer[1])


def test_changes_add_up(model, save):
    name, layer = QUERY
    weight = weight_of(model, layer).copy()
    files = [low_rank(name, weight, seed=10 * i) for i in range(2)]
    paths = [str(save(file, name=f"{i}.safetensors")) for i, file in enumerate(files)]
    LoraStack(model).apply([(paths[0], 0.5, 0), (paths[1], -2, 0), (paths[0], 0.25, 0)])
    assert close(
        weight_of(model, layer), weight + 0.75 * product(files[0], name) - 2 * product(files[1], name)
    )


def test_type_and_layout_stay(save):
    model, (name, layer) = tiny_model(), KERNEL
    tensors = low_rank(name, weight_of(model, layer))
    module = model.get_submodule(layer)
    exact = module.weight.half().float() + torch.from_numpy(product(tensors, name))
    module.to(torch.float16).to(memory_format=torch.channels_last).requires_grad_(True)
    with torch.inference_mode():
        LoraStack(model).apply([(str(save(tensors)), 1.0, 1.0)])
    assert module.weight.dtype == torch.float16 and module.weight.requires_grad
    assert module.weight.is_contiguous(memory_format=torch.channels_last)
    assert not module.weight.is_inference()
    assert torch.allclose(module.weight.float(), exact, rtol=1e-3, atol=1e-3)
    assert (module.weight.float() - exact).abs().max() <= (exact.half().float() - exact).abs().max() + 1e-6


# --- what is refused ------------------------------------------------------------------------------------------------


def refusal(model, path):
    with pytest.raises(CheckpointError) as caught:
        read_lora(path, layers_by_name(model), model)
    assert str(caught.value).isprintable() and str(path) in str(caught.value)
    return str(caught.value)


def test_other_models_are_named(model, save):
    fine = low_rank(*_named(model, QUERY))
    te2 = {"lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha": np.float32(1)}
    assert "SDXL" in refusal(model, save({**fine, **te2}))
    assert "SDXL" in refusal(model, save(fine, {"ss_base_model_version": "sdxl_base_v1-0"}))
    assert "Stable Diffusion 2" in refusal(model, save(fine, {"ss_v2": "True"}))
    keys = QUERY[0].replace("attn1_to_q", "attn2_to_k")
    for columns, other in ((1024, "Stable Diffusion 2"), (2048, "SDXL")):
        assert other in refusal(model, save(low_rank(keys, np.empty((32, columns)))))
    assert "no layer" in refusal(model, save(low_rank("lora_unet_layers_0_attention_qkv", np.empty((4, 4)))))


FOREIGN = {
    "lora_prior_unet_down_blocks_0_1_attention_to_q": "Stable Cascade",
    "lora_prior_te_text_model_encoder_layers_1_self_attn_v_proj": "Stable Cascade",
    "lora_unet_double_blocks_0_img_attn_qkv": "Flux",
    "diffusion_model.single_blocks.7.linear1": "Flux",
    "transformer.single_transformer_blocks.0.attn.to_q": "Flux",
    "lora_unet_joint_blocks_0_x_block_attn_qkv": "Stable Diffusion 3",
    "diffusion_model.joint_blocks.0.context_block.attn.qkv": "Stable Diffusion 3",
    "transformer.transformer_blocks.0.attn.add_k_proj": "Stable Diffusion 3",
    "lora_te3_encoder_block_0_layer_0_SelfAttention_q": "Stable Diffusion 3",
    "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q": "a model with a T5 text encoder",
    "diffusion_model.blocks.0.cross_attn.k": "Wan",
    "lora_unet_blocks_0_self_attn_q": "Wan",
    "transformer.transformer_blocks.0.attn1.to_q": "a diffusion transformer",
    "te2_text_model_encoder_layers_0_mlp_fc1": "SDXL",
    "text_encoders.clip_g.transformer.text_model.encoder.layers.0.mlp.fc1": "SDXL",
    "text_encoder_2.text_model.encoder.layers.0.mlp.fc1": "SDXL",
    "lora_unet_label_emb_0_0": "SDXL",
}


@pytest.mark.parametrize("key, other", FOREIGN.items())
def test_layers_of_other_models_tell_whose_they_are(model, save, key, other):
    """Though some of the file would fit: text encoders are shared by several models."""
    tensors = {**low_rank(*_named(model, WORDS)), f"{key}.lora_up.weight": normal(4, 2)}
    assert f"is a LoRA for {other}, and" in refusal(model, save(tensors))
    assert kind_of({key: torch.from_numpy(array) for key, array in tensors.items()}).family == other


@pytest.mark.parametrize("style", spellings())
def test_no_key_of_v1_is_taken_for_anothers(style):
    keys = [key.format("down", AB="A") for key in spellings()[style]]
    assert family_by_key(keys) == ""


def test_no_layer_of_v1_is_taken_for_anothers(v1):
    layers = layers_by_name(v1)
    keys = [prefix + name for prefix in ("lora_unet_", "lora_te_", "") for name in layers]
    keys += [prefix + path for prefix in ("", "transformer.") for path in layers.values()]
    assert len(keys) > 2000 and family_by_key(keys) == ""


def test_what_does_not_fit_is_named(model, save):
    name, layer = QUERY
    weight = weight_of(model, layer)
    fine = low_rank(name, weight)
    assert "[32, 5]" in refusal(model, save(low_rank(name, np.empty((32, 5)))))
    assert "[40, 32]" in refusal(model, save(low_rank(name, np.empty((40, 32)))))
    assert "down" in refusal(model, save({f"{name}.lora_down.weight": fine[f"{name}.lora_down.weight"]}))
    assert layer in refusal(model, save({**fine, f"{name}.lora_up.weight": normal(32, 2)}))
    assert "dora_scale" in refusal(model, save({**fine, f"{name}.dora_scale": normal(7, 1)}))
    assert "none" in refusal(model, save({**fine, f"{name}.diff_b": normal(32)}))
    for wrong in (
        {"alpha": normal(3)},
        {"lora_down.weight": np.float32(1)},
        {"lora_down.weight": normal(0, 32)},
    ):
        assert layer in refusal(model, save({**fine, **{f"{name}.{part}": t for part, t in wrong.items()}}))
    assert "two ways" in refusal(model, save({**fine, f"{name}.diff": weight}))
    twice = {key.replace(name, spellings()["sgm"][0].partition(".")[0]): t for key, t in fine.items()}
    assert "twice" in refusal(model, save({**fine, **twice}))
    for bad in (np.nan, np.inf):
        broken = fine[f"{name}.lora_up.weight"].copy()
        broken[3, 1] = bad
        assert "NaN or infinity" in refusal(model, save({**fine, f"{name}.lora_up.weight": broken}))


@pytest.mark.parametrize(
    "key, kind",
    [
        ("oft_unet_mid_block_attentions_0_proj_in.oft_blocks", "OFT"),
        (f"{QUERY[0]}.oft_blocks", "OFT"),
        (f"{QUERY[0]}.on_input", "IA3"),
        (f"{QUERY[0]}.a1.weight", "GLoRA"),
    ],
)
def test_other_kinds_are_named(model, save, key, kind):
    assert kind in refusal(model, save({key: normal(2, 2)}))


def test_keys_that_mean_nothing_are_counted(model, save, caplog):
    strange = {f"lora_unet_{i}\x1b.lora_up.weight": normal(1) for i in range(7)} | {
        "bundle_emb.x.y": normal(1)
    }
    path = save({**low_rank(*_named(model, QUERY)), **strange})
    with caplog.at_level(logging.WARNING):
        read_lora(path, layers_by_name(model), model)
    assert len(caplog.messages) == 1 and "8 keys" in caplog.messages[0]
    assert caplog.messages[0].isprintable()


def test_weights_must_be_finite(model, save):
    path = str(save(low_rank(*_named(model, QUERY))))
    with pytest.raises(InputError, match="inf"):
        LoraStack(model).apply([(path, float("inf"), 1.0)])


# --- files ----------------------------------------------------------------------------------------------------------


def test_names_find_files(tmp_path):
    for name in ("a/ink.safetensors", "b/ink.pt", "b/film.v2.safetensors", "b/film.v2.txt", "own.ckpt"):
        (tmp_path / "all" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "all" / name).write_bytes(b"x")
    (tmp_path / "given.safetensors").write_bytes(b"x")
    files = LoraFiles([tmp_path / "given.safetensors"], tmp_path / "all")
    assert files("given") == tmp_path / "given.safetensors"
    assert files("film.v2") == tmp_path / "all/b/film.v2.safetensors"
    assert files("b/ink") == tmp_path / "all/b/ink.pt"
    assert files("own") == tmp_path / "all/own.ckpt"
    assert LoraFiles(["own.ckpt"], tmp_path / "all")("own") == tmp_path / "all/own.ckpt"
    with pytest.raises(InputError, match="2 LoRA files named ink; use one of a/ink, b/ink"):
        files("ink")
    for name in ("none", "../given", str(tmp_path / "all/own.ckpt"), "", "film"):
        with pytest.raises(InputError, match="no LoRA named"):
            files(name)
    with pytest.raises(InputError, match="does not exist"):
        LoraFiles([], tmp_path / "nowhere")
    with pytest.raises(InputError, match="two LoRA files"):
        LoraFiles([tmp_path / "a.pt", tmp_path / "b/a.safetensors"])
    with pytest.raises(InputError, match="does not exist"):
        lora_file(tmp_path / "nothing.safetensors")


def test_a_name_may_have_its_ending(tmp_path):
    for name in ("all/a/ink.safetensors", "all/a/ink.pt", "all/b/oil.ckpt", "all/b/oil.ckpt.pt", "given.bin"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    files = LoraFiles([tmp_path / "given.bin"], tmp_path / "all")
    assert files("ink.pt") == files("a/ink.pt") == tmp_path / "all/a/ink.pt"
    assert files("ink.safetensors") == tmp_path / "all/a/ink.safetensors"
    assert files("given.bin") == tmp_path / "given.bin"
    assert files("oil.ckpt") == tmp_path / "all/b/oil.ckpt.pt", "a name without its ending comes first"
    with pytest.raises(InputError, match=r"2 LoRA files named ink; use one of a/ink\.pt, a/ink\.safetensors"):
        files("ink")
    for name in ("ink.ckpt", "given.pt", "oil.pt"):
        with pytest.raises(InputError, match="no LoRA named"):
            files(name)


def test_a_name_may_be_that_of_the_trainings_output(save, tmp_path):
    tensors = low_rank("x", np.empty((4, 4)))
    for name, trained in (("a", "ink_v2"), ("b", "wash"), ("sub/c", "wash"), ("wash-final", "a"), ("d", "")):
        save(tensors, {"ss_output_name": trained}, f"{name}.safetensors")
    save(tensors, None, "e.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"{" * 100)
    torch.save({"ss_output_name": "old"}, tmp_path / "f.pt")
    files = LoraFiles([], tmp_path)
    assert files("ink_v2") == tmp_path / "a.safetensors"
    assert files("a") == tmp_path / "a.safetensors", "the file of that name comes first"
    with pytest.raises(InputError, match="2 LoRA files named wash; use one of b, sub/c"):
        files("wash")
    for name in ("", "old", "None"):
        with pytest.raises(InputError, match="no LoRA named"):
            files(name)


def test_a_given_file_is_found_by_the_name_of_its_training(save, tmp_path):
    tensors = low_rank("x", np.empty((4, 4)))
    for name, trained in (
        ("given", "ink"),
        ("one", "wash"),
        ("two", "wash"),
        ("all/below", "ink"),
        ("all/c", "c"),
    ):
        save(tensors, {"ss_output_name": trained}, f"{name}.safetensors")
    files = LoraFiles([tmp_path / f"{name}.safetensors" for name in ("given", "one", "two", "gone")])
    assert files("ink") == files("given") == tmp_path / "given.safetensors"
    with pytest.raises(InputError, match="2 LoRA files named wash; use one of one, two"):
        files("wash")
    both = LoraFiles([tmp_path / "given.safetensors"], tmp_path / "all")
    assert both("ink") == tmp_path / "given.safetensors", "what was given comes first"
    assert both("below") == tmp_path / "all/below.safetensors" and both("c") == tmp_path / "all/c.safetensors"
    save(tensors, None, "all/ink.safetensors")
    folder = LoraFiles([tmp_path / "given.safetensors"], tmp_path / "all")
    assert folder("ink") == tmp_path / "all/ink.safetensors", (
        "a file's name comes before that of its training"
    )


def test_hash_is_the_web_uis(save, tmp_path):
    plain = save(low_rank("x", np.empty((4, 4))), {"ss_output_name": "x"})
    data = plain.read_bytes()
    after_header = data[8 + int.from_bytes(data[:8], "little") :]
    assert lora_hash(plain) == hashlib.sha256(after_header).hexdigest()[:12]
    noted = save(low_rank("x", np.empty((4, 4))), {"sshs_model_hash": "0123456789abcdef"}, "n.safetensors")
    assert lora_hash(noted) == "0123456789ab"
    old = tmp_path / "old.pt"
    torch.save({"x.lora_up.weight": torch.zeros(2)}, old)
    assert lora_hash(old) == hashlib.sha256(old.read_bytes()).hexdigest()[:12]


@pytest.mark.parametrize("adapter", ["default", "default_0", "my-style"])
@pytest.mark.parametrize(("name", "part"), [("A", "down"), ("B", "up"), ("magnitude_vector", "magnitude")])
def test_peft_may_name_its_adapter(adapter, name, part):
    layer = "base_model.model.x.attn2.to_k"
    keys = [f"{layer}.lora_{name}.weight", f"{layer}.lora_{name}.{adapter}.weight"]
    assert [split_key(key) for key in keys] == [Key(layer, part)] * 2
