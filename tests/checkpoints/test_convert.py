"""Conversions: values are unchanged, other libraries read the output, and it is written completely or not at all."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.checkpoints import convert as convert_module
from ldm.checkpoints import diffusers_folder
from ldm.checkpoints.convert import check_output, convert, layout_for
from ldm.checkpoints.formats import write
from ldm.checkpoints.formats.detect import CheckpointError
from ldm.checkpoints.formats.read import Checkpoint, read_checkpoint
from ldm.checkpoints.formats.write import write_safetensors
from ldm.checkpoints.layouts.names import to_diffusers
from ldm.checkpoints.layouts.recognise import ema_key
from ldm.checkpoints.load import SCHEDULE_BUFFERS, skip_init
from ldm.checkpoints.model_files import read_model
from ldm.config import read_config
from ldm.models.diffusion.plms import PLMSSampler
from ldm.pipeline import load_model
from ldm.util import InputError
from tests.support.golden_data import (
    figure,
    inpainting_config,
    keys,
    relative_error,
    small_config,
    tiny_model,
    weight_of,
)

State = Mapping[str, Tensor]
BUNDLED = "configs/shapes/shapes-inference.yaml", "models/ldm/shapes/model.ckpt"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model as a checkpoint, schedule and position ids included."""
    path = tmp_path_factory.mktemp("source") / "small.ckpt"
    torch.save({"state_dict": tiny_model(small_config()).state_dict(), "global_step": 470000}, path)
    return path


@pytest.fixture(scope="module")
def folder(file: Path) -> Path:
    """The small model as a diffusers folder."""
    convert(read_model(file), small_config(), file.parent / "folder", "diffusers")
    return file.parent / "folder"


@pytest.fixture(scope="module")
def painter() -> Any:
    """A small model with nine channels."""
    return tiny_model(inpainting_config(small_config()))


def shapes_of(state: State) -> dict[str, torch.Size]:
    return {key: tensor.shape for key, tensor in state.items()}


def assert_equal(actual: State, expected: State) -> None:
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        assert actual[key].dtype == tensor.dtype and torch.equal(actual[key], tensor), key


# --- there and back -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "to"), [("a.safetensors", "compvis"), ("a", "diffusers")])
def test_what_a_killed_conversion_left_is_removed(file: Path, tmp_path: Path, name: str, to: Any) -> None:
    for left in (f".{name}.0123abcd.part", ".another.0123abcd.part"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "weights").touch()
    convert(read_model(file), small_config(), tmp_path / name, to)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".another.0123abcd.part", name]


def test_a_small_model_comes_back_from_diffusers(file: Path, folder: Path, tmp_path: Path) -> None:
    convert(read_model(folder), small_config(), tmp_path / "back.safetensors", "compvis")
    assert_equal(read_checkpoint(tmp_path / "back.safetensors").state_dict, read_checkpoint(file).state_dict)


def test_an_inpainting_model_comes_back_from_diffusers(painter: Any, tmp_path: Path) -> None:
    config, state = inpainting_config(small_config()), painter.state_dict()
    torch.save(state, tmp_path / "bare.pt")
    convert(read_model(tmp_path / "bare.pt"), config, tmp_path / "folder", "diffusers")
    index = json.loads((tmp_path / "folder" / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionInpaintPipeline"
    convert(read_model(tmp_path / "folder"), config, tmp_path / "back.ckpt", "ckpt")
    assert_equal(read_checkpoint(tmp_path / "back.ckpt").state_dict, state)
    assert torch.load(tmp_path / "back.ckpt", weights_only=True)["state_dict"].keys() == state.keys()


def test_the_bundled_model_comes_back_with_its_vocabulary(tmp_path: Path) -> None:
    config = read_config(BUNDLED[0])
    convert(read_model(BUNDLED[1]), config, tmp_path / "folder", "diffusers")
    written, own = (
        json.loads(Path(p, "vocab.json").read_text())
        for p in (tmp_path / "folder/tokenizer", "models/ldm/shapes")
    )
    assert written == own
    convert(read_model(tmp_path / "folder"), config, tmp_path / "back.safetensors", "compvis")
    assert_equal(
        read_checkpoint(tmp_path / "back.safetensors").state_dict, read_checkpoint(BUNDLED[1]).state_dict
    )


# --- precision and averages ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("to", ["compvis", "ckpt"])
def test_weights_are_cast_and_the_schedule_is_not(
    file: Path, tmp_path: Path, dtype: torch.dtype, to: Any
) -> None:
    out = tmp_path / ("a.safetensors" if to == "compvis" else "a.ckpt")
    convert(read_model(file), small_config(), out, to, dtype)
    expected = {
        key: tensor.to(dtype) if tensor.is_floating_point() and key not in SCHEDULE_BUFFERS else tensor
        for key, tensor in read_checkpoint(file).state_dict.items()
    }
    assert_equal(read_checkpoint(out).state_dict, expected)


def with_averages(state: State) -> dict[str, Tensor]:
    averages = {ema_key(key): tensor + 1 for key, tensor in state.items() if key.startswith("model.")}
    counters = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
    return {**state, **averages, **counters}


@pytest.mark.parametrize("ema", ["auto", "on", "off", "both"])
def test_averaged_weights(file: Path, tmp_path: Path, ema: Any) -> None:
    plain = read_checkpoint(file).state_dict
    source = Checkpoint(file, "torch zip", with_averages(plain))
    convert(source, small_config(), tmp_path / "a.safetensors", "compvis", ema=ema)
    averaged = {key: tensor + 1 if key.startswith("model.") else tensor for key, tensor in plain.items()}
    expected = {"off": plain, "both": with_averages(plain)}.get(ema, averaged)
    assert_equal(read_checkpoint(tmp_path / "a.safetensors").state_dict, expected)


def test_averages_that_are_not_there(file: Path, tmp_path: Path) -> None:
    for ema in ("on", "both"):
        with pytest.raises(CheckpointError, match="has no EMA weights"):
            convert(read_model(file), small_config(), tmp_path / "a.ckpt", "ckpt", ema=ema)
    incomplete = dict(list(with_averages(read_checkpoint(file).state_dict).items())[:-5])
    with pytest.raises(CheckpointError, match=r"lacks \d+ key"):
        source = Checkpoint(file, "torch zip", incomplete)
        convert(source, small_config(), tmp_path / "a.ckpt", "ckpt", ema="both")
    assert list(tmp_path.iterdir()) == []


# --- the files ----------------------------------------------------------------------------------------------------


def test_the_safetensors_library_reads_what_is_written(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    state = {
        "half": weight_of("a", (3, 5)).half(),
        "whole": torch.arange(3),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "strided": weight_of("b", (4, 6)).t(),
        "float8": weight_of("c", (3,)).to(torch.float8_e4m3fn),
        "truth": torch.tensor([True, False]),
        "snow ☃": torch.ones(1, dtype=torch.float64),
    }
    write_safetensors(tmp_path / "a", state, None, {"format": "pt", "title": '"☃"'})
    with safetensors.safe_open(tmp_path / "a", "pt") as theirs:
        assert theirs.metadata() == {"format": "pt", "title": '"☃"'}
        assert set(theirs.keys()) == set(state)
        for key, tensor in state.items():
            found = theirs.get_tensor(key)
            assert found.dtype == tensor.dtype and torch.equal(found.float(), tensor.float()), key
    assert_equal(
        {k: v.float() for k, v in read_checkpoint(tmp_path / "a").state_dict.items()},
        {k: v.float() for k, v in state.items()},
    )


def test_the_file_says_what_it_is(file: Path, tmp_path: Path) -> None:
    import hashlib

    out = tmp_path / "My model.safetensors"
    convert(read_model(file), small_config(), out, "compvis", torch.float16)
    said = read_checkpoint(out).metadata
    data = out.read_bytes()
    tensors = data[8 + int.from_bytes(data[:8], "little") :]
    assert said == {
        "format": "pt",
        "global_step": "470000",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v1",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": "My model",
        "modelspec.resolution": "64x64",
        "modelspec.prediction_type": "epsilon",
        "modelspec.unet_dtype": "float16",
        "modelspec.vae_dtype": "float16",
        "modelspec.hash_sha256": f"0x{hashlib.sha256(tensors).hexdigest()}",
    }
    again = tmp_path / "again.safetensors"
    convert(read_model(out), small_config(), again, "compvis")
    assert read_checkpoint(again).metadata == said, "a title stays"


@pytest.mark.parametrize("to", ["compvis", "ckpt", "diffusers"])
def test_a_conversion_that_fails_leaves_nothing(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: Any
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    monkeypatch.setattr(write, "_header", full)
    out = tmp_path / {"compvis": "a.safetensors", "ckpt": "a.ckpt"}.get(to, "a")
    with pytest.raises(OSError, match="No space"):
        convert(read_model(file), small_config(), out, to)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
@pytest.mark.parametrize("limit", [5_000, 200_000])
@pytest.mark.parametrize("to", ["compvis", "ckpt", "diffusers"])
def test_a_disk_that_fills_up_is_an_os_error_that_names_the_output(
    file: Path, tmp_path: Path, to: Any, limit: int
) -> None:
    """The system refuses to write more than `limit` bytes to a file, as a full disk does."""
    import resource

    out = tmp_path / {"compvis": "a.safetensors", "ckpt": "a.ckpt"}.get(to, "a")
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            convert(read_model(file), small_config(), out, to)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert caught.value.filename == str(out)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", ["compvis", "diffusers"])
def test_what_appears_meanwhile_is_not_overwritten(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: Any
) -> None:
    out = tmp_path / ("a.safetensors" if to == "compvis" else "a")

    def slowly(*arguments: Any) -> None:
        out.write_text("somebody else's")
        write_safetensors(*arguments)

    for module in (convert_module, diffusers_folder):
        monkeypatch.setattr(module, "write_safetensors", slowly)
    with pytest.raises(FileExistsError):
        convert(read_model(file), small_config(), out, to)
    assert out.read_text() == "somebody else's" and list(tmp_path.iterdir()) == [out]


def test_an_empty_folder_is_filled_and_others_are_not(file: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    convert(read_model(file), small_config(), tmp_path / "empty", "diffusers", torch.float16)
    assert (tmp_path / "empty" / "model_index.json").is_file()
    with pytest.raises(InputError, match="exists already, and nothing is overwritten"):
        check_output(tmp_path / "empty", "diffusers", "auto")


@pytest.mark.parametrize(
    ("name", "to", "ema", "reason"),
    [
        ("a.bin", "compvis", "auto", "name it so"),
        ("a.ckpt", "compvis", "auto", "name it so"),
        ("a.safetensors", "diffusers", "auto", "is a folder"),
        ("a", "diffusers", "both", "one set of weights"),
        ("none/a", "diffusers", "auto", "make it first"),
        ("there", "ckpt", "auto", "exists already"),
    ],
)
def test_outputs_that_cannot_be(tmp_path: Path, name: str, to: Any, ema: Any, reason: str) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(InputError, match=reason):
        check_output(tmp_path / name, to, ema)


def test_the_ending_says_the_layout() -> None:
    assert [layout_for(name) for name in ("a.safetensors", "a.CKPT", "a", "sd-v1.5")] == [
        "compvis", "ckpt", "diffusers", "diffusers",
    ]  # fmt: skip


# --- diffusers itself ---------------------------------------------------------------------------------------------

PROMPT = "a photograph of an astronaut riding a horse"


@pytest.fixture(scope="module")
def small() -> Any:
    """A small model with OpenAI's vocabulary."""
    return tiny_model(small_config(own_words=False))


@pytest.fixture(scope="module")
def with_openais_words(tmp_path_factory: pytest.TempPathFactory, small: Any) -> Path:
    """The same as a diffusers folder."""
    folder = tmp_path_factory.mktemp("openai") / "small"
    source = Checkpoint(folder, "torch zip", small.state_dict())
    convert(source, small_config(own_words=False), folder, "diffusers")
    return folder


@pytest.fixture(scope="module")
def theirs(with_openais_words: Path) -> Any:
    """The folder as loaded by diffusers, offline."""
    diffusers = pytest.importorskip("diffusers")
    diffusers.utils.logging.disable_progress_bar()
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(
        with_openais_words, safety_checker=None, local_files_only=True
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def our_latents(model: Any, steps: int) -> Tensor:
    conditioning, nothing = (model.get_learned_conditioning([text]) for text in (PROMPT, ""))
    start = figure("sample/x_T")[:1]
    latents, _ = PLMSSampler(model).sample(
        S=steps,
        batch_size=1,
        shape=start.shape[1:],
        conditioning=conditioning,
        x_T=start,
        unconditional_guidance_scale=7.5,
        unconditional_conditioning=nothing,
        verbose=False,
    )
    return latents


def their_latents(pipe: Any, steps: int) -> Tensor:
    start = figure("sample/x_T")[:1]
    size = [8 * side for side in start.shape[-2:]]
    return pipe(
        PROMPT, *size, num_inference_steps=steps, guidance_scale=7.5, latents=start, output_type="latent"
    ).images  # fmt: skip


@pytest.mark.long
def test_names_and_shapes_are_those_of_diffusers_own_v1_networks() -> None:
    diffusers = pytest.importorskip("diffusers")
    four = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    state = {key: torch.empty(shape, device="meta") for key, shape in keys("keys_v1.json").items()}
    with torch.device("meta"), skip_init():
        unet = diffusers.UNet2DConditionModel(cross_attention_dim=768)
        vae = diffusers.AutoencoderKL(**four, block_out_channels=(128, 256, 512, 512), layers_per_block=2)
    parts = to_diffusers(state)
    assert shapes_of(parts["unet"]) == shapes_of(unet.state_dict())
    assert shapes_of(parts["vae"]) == shapes_of(vae.state_dict())


@pytest.mark.long
def test_diffusers_computes_the_same_latents(small: Any, theirs: Any) -> None:
    assert relative_error(their_latents(theirs, 10), our_latents(small, 10)) < 2e-5


@pytest.mark.long
@torch.no_grad()
def test_diffusers_encodes_and_decodes_the_same(small: Any, theirs: Any) -> None:
    picture = figure("sample/x_T")[:1, :3].repeat(1, 1, 8, 8).clamp(-1, 1)
    ours = small.encode_first_stage(picture).parameters
    assert relative_error(theirs.vae.encode(picture).latent_dist.parameters, ours) < 2e-5
    latents = figure("sample/x_T")[:1]
    scaled = latents / theirs.vae.config.scaling_factor
    assert relative_error(theirs.vae.decode(scaled).sample, small.decode_first_stage(latents)) < 2e-5


def test_transformers_finds_every_weight_under_its_name(
    with_openais_words: Path, caplog: pytest.LogCaptureFixture
) -> None:
    transformers = pytest.importorskip("transformers")
    _, report = transformers.CLIPTextModel.from_pretrained(
        with_openais_words / "text_encoder", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokenizer = transformers.CLIPTokenizer.from_pretrained(with_openais_words / "tokenizer")
    assert tokenizer(PROMPT).input_ids == [49406, 320, 8853, 539, 550, 18376, 6765, 320, 4558, 49407]
    assert tokenizer.model_max_length == 77


SAVED: list[dict[str, Any]] = [
    {},
    {"safe_serialization": False},
    {"variant": "fp16"},
    {"max_shard_size": "100KB"},
]


@pytest.mark.parametrize("options", SAVED, ids=str)
def test_what_diffusers_saves_loads_with_the_same_output(
    theirs: Any, small: Any, tmp_path: Path, options: dict[str, Any]
) -> None:
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    theirs.save_pretrained(tmp_path / "saved", **options)
    model = load_model(small_config(own_words=False), tmp_path / "saved")
    assert_equal(
        {key: tensor for key, tensor in model.state_dict().items() if key not in SCHEDULE_BUFFERS},
        {key: tensor for key, tensor in small.state_dict().items() if key not in SCHEDULE_BUFFERS},
    )
    ours, expected = (each.get_learned_conditioning([PROMPT]) for each in (model, small))
    assert relative_error(ours, expected) < 2e-5  # the bits depend on the memory alignment of the weights


@pytest.mark.parametrize("other", ["painter", "bundled"])
@torch.no_grad()
def test_diffusers_predicts_the_same_noise_with_other_models(
    request: pytest.FixtureRequest, tmp_path: Path, other: str
) -> None:
    """Nine channels; another number of levels and blocks, a level without attention, other groups."""
    diffusers = pytest.importorskip("diffusers")
    model = (
        request.getfixturevalue("painter")
        if other == "painter"
        else load_model(read_config(BUNDLED[0]), BUNDLED[1])
    )
    config = inpainting_config(small_config()) if other == "painter" else read_config(BUNDLED[0])
    convert(Checkpoint(tmp_path, "torch zip", model.state_dict()), config, tmp_path / "folder", "diffusers")
    unet = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "folder" / "unet")
    ours = model.model.diffusion_model
    x = weight_of("x", (1, ours.in_channels, 16, 16))
    context = weight_of("context", (1, 7, unet.config.cross_attention_dim))
    t = torch.tensor([321])
    assert relative_error(unet(x, t, context).sample, ours(x, t, context)) < 2e-5
    vae = diffusers.AutoencoderKL.from_pretrained(tmp_path / "folder" / "vae")
    latents = weight_of("latents", (1, 4, 8, 8))
    decoded = vae.decode(latents / vae.config.scaling_factor).sample
    assert relative_error(decoded, model.decode_first_stage(latents)) < 2e-5
