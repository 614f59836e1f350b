"""Loading a checkpoint into a model: which tensors are set, and which files are refused."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from ldm.checkpoints.configs import config_for
from ldm.checkpoints.formats.detect import CheckpointError
from ldm.checkpoints.formats.read import Checkpoint, read_checkpoint
from ldm.checkpoints.formats.tensor_bytes import FLOAT8
from ldm.checkpoints.inspect import inspect_path
from ldm.checkpoints.layouts.recognise import ema_key, kind_of
from ldm.checkpoints.load import SCHEDULE_BUFFERS, _held_in, build_model, check_fit, load_into
from ldm.checkpoints.model_files import read_model
from ldm.pipeline import load_model
from tests.support.checkpoint_files import save_like_lightning, tiny_state_dict
from tests.support.golden_data import keys, rebuilt_state_dict, small_config, tiny_config, tiny_model
from tests.support.paths import GOLDEN

POSITIONS = "cond_stage_model.transformer.text_model.embeddings.position_ids"
NORM = "cond_stage_model.transformer.text_model.final_layer_norm.weight"
UNET = "model.diffusion_model.time_embed.0.weight"


def model_of(shapes: Mapping[str, tuple[int, ...] | torch.Size]) -> nn.Module:
    """A model with the given keys, its weights on the meta device and its computed buffers on the CPU."""
    root = nn.Module()
    for key, shape in shapes.items():
        *path, name = key.split(".")
        module = root
        for part in path:
            if part not in dict(module.named_children()):
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        if key in SCHEDULE_BUFFERS or name in ("position_ids", "decay", "num_updates"):
            module.register_buffer(name, torch.full(shape, 7.0))
        elif key.startswith("model_ema."):
            module.register_buffer(name, torch.empty(shape, device="meta"))
        else:
            module.register_parameter(name, nn.Parameter(torch.empty(shape, device="meta")))
    return root


SMALL = {
    "betas": (4,),
    POSITIONS: (1, 5),
    UNET: (3, 2),
    "first_stage_model.quant_conv.weight": (2,),
    NORM: (6,),
}


def small_file(**changes: torch.Tensor | None) -> Checkpoint:
    state = {key: torch.full(shape, float(i + 1)) for i, (key, shape) in enumerate(SMALL.items())}
    return checkpoint_of({**state, **changes})


def checkpoint_of(state: Mapping[str, torch.Tensor | None]) -> Checkpoint:
    return Checkpoint(
        Path("m\n.ckpt"), "torch zip", {key: value for key, value in state.items() if value is not None}
    )


def test_every_tensor_of_a_v1_file_arrives_without_a_copy(tmp_path: Path) -> None:
    state = tiny_state_dict()
    save_like_lightning(tmp_path / "m.ckpt", state)
    model = model_of({key: tensor.shape for key, tensor in state.items()})
    checkpoint = read_checkpoint(tmp_path / "m.ckpt")
    report = load_into(model, checkpoint, torch.float32)
    loaded = model.state_dict()
    for key, tensor in state.items():
        if key in SCHEDULE_BUFFERS:
            assert (loaded[key] == 7).all(), "the model's own schedule stays"
        else:
            assert torch.equal(loaded[key], tensor), key
            assert loaded[key].data_ptr() == checkpoint.state_dict[key].data_ptr(), "no second copy"
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert set(report.computed) == SCHEDULE_BUFFERS and report.weights == "plain"
    assert report.ignored == report.unknown == report.cast_from == ()


@pytest.mark.parametrize(
    "saved", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn], ids=str
)
def test_weights_are_cast_and_it_is_said(saved: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    model = model_of(SMALL)
    report = load_into(model, small_file(**{UNET: torch.full((3, 2), 1.5, dtype=saved)}), torch.float32)
    assert model.state_dict()[UNET].dtype == torch.float32 and (model.state_dict()[UNET] == 1.5).all()
    assert report.cast_from == (saved,)
    assert f"cast from {saved} to torch.float32" in caplog.text


def test_without_a_dtype_the_files_types_stay() -> None:
    model = model_of(SMALL)
    load_into(model, small_file(**{UNET: torch.ones(3, 2, dtype=torch.bfloat16)}))
    assert (
        model.state_dict()[UNET].dtype == torch.bfloat16 and model.state_dict()[NORM].dtype == torch.float32
    )


@pytest.mark.parametrize("in_file", [True, False])
def test_computed_buffers_may_be_missing_and_keep_the_models_values(in_file: bool) -> None:
    model = model_of(SMALL)
    changes: dict[str, torch.Tensor | None] = {} if in_file else {"betas": None, POSITIONS: None}
    load_into(model, small_file(**changes))
    assert (model.state_dict()["betas"] == 7).all() and (model.state_dict()[POSITIONS] == 7).all()


def test_a_buffer_left_on_meta_is_taken_from_the_file_or_missed() -> None:
    def on_meta() -> nn.Module:
        model = model_of(SMALL)
        model.register_buffer("betas", torch.empty(4, device="meta"))
        return model

    model = on_meta()
    load_into(model, small_file())
    assert (model.state_dict()["betas"] == 1).all()
    with pytest.raises(CheckpointError, match=r"lacks 1 key \(betas\)"):
        load_into(on_meta(), small_file(betas=None))
    model.register_buffer("hidden", torch.empty(1, device="meta"), persistent=False)
    with pytest.raises(AssertionError, match="hidden"):
        load_into(model, small_file())


@pytest.mark.parametrize("key", [UNET, NORM, "first_stage_model.quant_conv.weight"])
def test_a_missing_weight_is_an_error(key: str) -> None:
    model = model_of(SMALL)
    with pytest.raises(CheckpointError, match=rf"^m\\n.ckpt: lacks 1 key \({key}\) that the model needs$"):
        load_into(model, small_file(**{key: None}))
    assert model.get_parameter(key).is_meta, "nothing was loaded"


def test_many_missing_keys_are_counted_and_five_named() -> None:
    shapes = {f"first_stage_model.a{i}": (1,) for i in range(9)}
    with pytest.raises(CheckpointError, match=r"lacks 9 keys \((\S+a[0-4], ){5}\.\.\.\)"):
        load_into(model_of({**SMALL, **shapes}), small_file())


@pytest.mark.parametrize("key", list(SMALL))
def test_a_wrong_shape_is_an_error_with_both_shapes(key: str) -> None:
    wrong = torch.zeros(9, 9)
    with pytest.raises(CheckpointError) as error:
        load_into(model_of(SMALL), small_file(**{key: wrong}))
    assert f"{key} has shape [9, 9], the model expects {list(SMALL[key])}:" in str(error.value)
    assert "config or checkpoint is of another model" in str(error.value)


def test_whole_numbers_are_no_weights() -> None:
    with pytest.raises(CheckpointError, match=r"is torch\.int8, the model expects torch\.float32"):
        load_into(model_of(SMALL), small_file(**{UNET: torch.ones(3, 2, dtype=torch.int8)}))


def test_harmless_leftovers_are_silent_and_others_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    one = torch.ones(1)
    harmless = ["lvlb_weights", "model_ema.decay", "model_ema.num_updates", "first_stage_model.loss.logvar"]
    harmless += ["posterior_variance", "other.position_ids"]
    report = load_into(model_of(SMALL), small_file(**dict.fromkeys(harmless, one)))
    assert report.ignored == tuple(harmless) and report.unknown == () and not caplog.records
    unknown = [f"extra{i}\x1b" for i in range(7)]
    report = load_into(model_of(SMALL), small_file(**dict.fromkeys(unknown, one)))
    assert report.unknown == tuple(unknown)
    (record,) = caplog.records
    assert "ignored 7 keys (extra0\\x1b, extra1\\x1b" in record.getMessage()
    assert "extra4" in record.getMessage() and "extra5" not in record.getMessage()


@pytest.mark.parametrize(
    ("ema", "value", "weights"), [("auto", 50.0, "ema"), ("on", 50.0, "ema"), ("off", 3.0, "plain")]
)
def test_moving_averages_replace_the_unet_unless_switched_off(
    ema: str, value: float, weights: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    average = "model_ema.diffusion_modeltime_embed0weight"
    model = model_of(SMALL)
    file = small_file(**{average: torch.full((3, 2), 50.0), "model_ema.decay": torch.ones(())})
    report = load_into(model, file, ema=ema)  # pyright: ignore[reportArgumentType]
    assert (model.state_dict()[UNET] == value).all() and (model.state_dict()[NORM] == 5).all()
    assert report.weights == weights
    assert f"using the {'EMA' if weights == 'ema' else 'plain'} weights" in caplog.text


def test_names_of_moving_averages_equal_the_published_ones() -> None:
    published = set(json.loads((GOLDEN / "keys_v1_ema.json").read_text()))
    averages = {key for key in published if key.startswith("model_ema.")} - {
        "model_ema.decay",
        "model_ema.num_updates",
    }
    assert {ema_key(key) for key in published if key.startswith("model.")} == averages and len(
        averages
    ) == 686


def test_demanded_or_incomplete_averages_are_errors() -> None:
    with pytest.raises(CheckpointError, match="has no EMA weights"):
        load_into(model_of(SMALL), small_file(), ema="on")
    file = small_file(**{"model_ema.diffusion_modelsomethingelse": torch.ones(1)})
    with pytest.raises(
        CheckpointError, match=r"lacks 1 key \(model_ema\.diffusion_modeltime_embed0weight\).*ema off"
    ):
        load_into(model_of(SMALL), file)


def test_a_file_may_hold_averages_only(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    model, average = model_of(SMALL), torch.rand(3, 2)
    file = small_file(**{UNET: None, ema_key(UNET): average})
    assert load_into(model, file).weights == "ema"
    assert torch.equal(model.state_dict()[UNET], average)
    assert "using the EMA weights, it has no others" in caplog.text
    with pytest.raises(CheckpointError, match=r"has only EMA weights .* load it with ema auto"):
        load_into(model_of(SMALL), file, ema="off")
    other = {UNET: None, "model_ema.diffusion_modelsomethingelse": torch.ones(1)}
    with pytest.raises(CheckpointError, match="lacks 1 key") as caught:
        load_into(model_of(SMALL), small_file(**other))
    assert "ema off" not in str(caught.value), "there is nothing else to load"


@pytest.mark.parametrize("name", ["keys_v1_ema.json", "keys_inpaint.json"])
def test_averages_only_tell_the_model(name: str) -> None:
    shapes = keys(name)
    whole = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    averages = {ema_key(key): whole[key] for key in shapes if key.startswith("model.diffusion_model.")}
    rest = {key: tensor for key, tensor in whole.items() if not key.startswith(("model.", "model_ema."))}
    assert kind_of({**rest, **averages}) == kind_of(whole)
    assert config_for({**rest, **averages}) == config_for(whole)
    assert kind_of(averages).part == "U-Net" and kind_of(averages).variant == kind_of(whole).variant


def test_a_model_with_averages_takes_a_file_without() -> None:
    average = ema_key(UNET)
    model = model_of({**SMALL, average: (3, 2), "model_ema.decay": (), "model_ema.num_updates": ()})
    load_into(model, small_file())
    assert (model.state_dict()[average] == 3).all() and model.state_dict()["model_ema.decay"] == 7


def test_another_model_is_named_in_the_refusal() -> None:
    file = checkpoint_of({"conditioner.embedders.0.x": torch.ones(1)})
    with pytest.raises(
        CheckpointError, match=r"it looks like SDXL, and this toolkit runs Stable Diffusion v1$"
    ):
        load_into(model_of(SMALL), file)
    conv = "model.diffusion_model.input_blocks.0.0.weight"
    nine = small_file(**{conv: torch.ones(2, 9, 3, 3)})
    with pytest.raises(
        CheckpointError, match=r"\[2, 9, 3, 3\], the model expects \[2, 4, 3, 3\].*inpainting config"
    ):
        load_into(model_of({**SMALL, conv: (2, 4, 3, 3)}), nine)


@pytest.mark.parametrize("dtype", FLOAT8, ids=str)
def test_each_value_of_float8_is_held_exactly(dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    """All 256 of them: the wider type is chosen by a table, and float64 holds everything."""
    caplog.set_level(logging.INFO)
    values = torch.arange(256, dtype=torch.uint8).view(dtype)
    model = model_of({UNET: (256,)})
    load_into(model, checkpoint_of({UNET: values}))
    held = model.state_dict()[UNET]
    assert held.dtype is (torch.bfloat16 if dtype is torch.float8_e8m0fnu else torch.float16)
    assert torch.equal(held.double().nan_to_num(7e77), values.double().nan_to_num(7e77))
    assert f"cast from {dtype} to {held.dtype}" in caplog.text
    assert _held_in(values.float(), None) is torch.float32


@pytest.mark.parametrize(
    ("dtype", "ending"),
    [
        (torch.float8_e4m3fn, "ckpt"),
        (torch.float8_e5m2, "safetensors"),
        (torch.float8_e4m3fnuz, "safetensors"),
        (torch.float8_e5m2fnuz, "ckpt"),
    ],
    ids=str,
)
def test_a_whole_model_in_float8_has_the_values_that_torch_widens_it_to(
    tmp_path: Path, dtype: torch.dtype, ending: str
) -> None:
    state = {
        key: value.to(dtype) if value.is_floating_point() and value.dim() > 1 else value
        for key, value in rebuilt_state_dict(build_model(small_config())).items()
    }
    path = tmp_path / f"m.{ending}"
    if ending == "ckpt":
        torch.save({"state_dict": state}, path)
        saved = torch.load(path, weights_only=True)["state_dict"]
    else:
        safetensors.torch.save_file({key: value.contiguous() for key, value in state.items()}, path)
        saved = safetensors.torch.load_file(path)
    (found,) = inspect_path(path, deep=False)
    eighths = sum(value.numel() for value in saved.values() if value.dtype is dtype)
    assert found.precisions[str(dtype).removeprefix("torch.")] == eighths > 1e5
    loaded = load_model(small_config(), path, dtype=torch.float32).state_dict()
    for key, value in saved.items():
        if key not in SCHEDULE_BUFFERS and value.is_floating_point():
            assert loaded[key].dtype is torch.float32 and torch.equal(loaded[key], value.to(torch.float32)), (
                key
            )
    narrow = load_model(small_config(), path, dtype=None)
    weight = narrow.get_parameter(UNET)
    assert weight.dtype is _held_in(saved[UNET], None) and torch.equal(weight.double(), saved[UNET].double())


# --- files that are not models ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole() -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in tiny_model().state_dict().items() if "position_ids" not in key}


def refusal(path: Path, text_encoder: Path | None = None) -> str:
    with pytest.raises(CheckpointError) as caught:
        check_fit(build_model(tiny_config()), read_model(path, text_encoder=text_encoder))
    assert str(caught.value).isprintable()
    return str(caught.value)


POSITION_ROWS = "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight"


@pytest.mark.long
def test_a_text_encoder_for_longer_prompts_is_told(whole: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """LongCLIP has 248 positions, and the transformers library writes it under the names of any CLIP."""
    model, long, folder = tmp_path / "m.ckpt", tmp_path / "long.ckpt", tmp_path / "text_encoder"
    torch.save(whole, model)
    torch.save({**whole, POSITION_ROWS: torch.zeros(248, 64)}, long)
    prefix = "cond_stage_model.transformer."
    text = {key.removeprefix(prefix): tensor for key, tensor in whole.items() if key.startswith(prefix)}
    text[POSITION_ROWS.removeprefix(prefix)] = torch.zeros(248, 64)
    bare = tmp_path / "text.bin"
    torch.save(text, bare)
    folder.mkdir()
    torch.save(text, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 248}))
    for said in (refusal(long), refusal(model, text_encoder=bare), refusal(model, text_encoder=folder)):
        assert "its text encoder has 248 positions of tokens" in said and "this config's model 77" in said
        assert "give a text encoder with 77: --text_encoder" in said
    check_fit(build_model(tiny_config()), read_model(long, text_encoder=model))
    theirs = tmp_path / "longclip-L.pt"
    torch.save({"positional_embedding": torch.zeros(248, 8), "positional_embedding_res": torch.zeros(248, 8),
                "transformer.resblocks.0.ln_1.weight": torch.zeros(8)}, theirs)  # fmt: skip
    said = refusal(model, text_encoder=theirs)
    assert "has no text encoder: it is a LongCLIP (248 positions, where v1 has 77)" in said


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("controlnet_cond_embedding.conv_in.weight", "is a ControlNet in the diffusers layout, not a model"),
        ("control_model.zero_convs.0.0.weight", "is a ControlNet, not a model; give it with --control"),
        ("down_blocks.0.motion_modules.0.temporal_transformer.norm.weight", "is a motion module"),
        ("body.0.in_conv.weight", "is a T2I-Adapter, not a model"),
        ("lora_unet_mid_block_attentions_0_proj_in.lora_up.weight", "not a model; give it with --lora"),
        ("emb_params", "is a textual inversion embedding in the kohya layout, not a model; give it with --embedding"),
        ("down_blocks.0.0.channelwise.0.weight", "lacks"),
    ],
)  # fmt: skip
def test_what_is_no_model_is_named(key: str, said: str, tmp_path: Path) -> None:
    torch.save({key: torch.zeros(2, 3), "extra.weight": torch.zeros(3)}, tmp_path / "m.ckpt")
    model = build_model(tiny_config())
    with pytest.raises(CheckpointError) as caught:
        checkpoint = read_model(tmp_path / "m.ckpt")
        check_fit(model, checkpoint)
        load_into(model, checkpoint)
    assert said in str(caught.value) and "U-Net" not in str(caught.value)
