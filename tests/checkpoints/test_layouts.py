"""Every layout of a v1 model is read, and a model that is not v1 is named."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.checkpoints import hashing
from ldm.checkpoints.convert import convert
from ldm.checkpoints.formats.detect import CheckpointError
from ldm.checkpoints.formats.write import write_safetensors
from ldm.checkpoints.layouts.names import PREFIXES, parts_in, to_compvis, to_diffusers
from ldm.checkpoints.layouts.settings import component_configs
from ldm.checkpoints.load import build_model, check_fit
from ldm.checkpoints.model_files import model_files, read_model
from ldm.config import read_config
from ldm.pipeline import load_model
from ldm.runs.settings import file_digests, vocabulary_files
from ldm.util import InputError
from tests.support.golden_data import inpainting_config, rebuilt_state_dict, small_config
from tests.support.paths import GOLDEN

State = Mapping[str, Tensor]
LISTS = ["keys_v1.json", "keys_v1_ema.json", "keys_inpaint.json", "tiny_keys.json"]


def published(name: str) -> dict[str, Tensor]:
    shapes = json.loads((GOLDEN / name).read_text())
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


def weights_in(state: State) -> dict[str, Tensor]:
    return {
        key: tensor
        for key, tensor in state.items()
        if key.startswith(tuple(PREFIXES.values())) and not key.endswith("position_ids")
    }


def shapes_of(state: State) -> dict[str, torch.Size]:
    return {key: tensor.shape for key, tensor in state.items()}


# --- names --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LISTS)
def test_published_keys_go_there_and_back(name: str) -> None:
    state = published(name)
    parts = to_diffusers(state)
    joined = {f"{part}.{key}": tensor for part, weights in parts.items() for key, tensor in weights.items()}
    assert shapes_of(to_compvis(joined)) == shapes_of(weights_in(state))
    for part, weights in parts.items():
        own = {key: tensor for key, tensor in weights_in(state).items() if key.startswith(PREFIXES[part])}
        assert shapes_of(to_compvis(weights)) == shapes_of(own), f"{part} in a file of its own"
    assert to_compvis(state) == state, "what has its names keeps them, averages and schedule included"


@pytest.mark.parametrize(
    "config", [inpainting_config, lambda: read_config("configs/shapes/shapes-inference.yaml")]
)
def test_sizes_of_other_models_are_counted_in_their_keys(config: Callable[[], Any]) -> None:
    state = build_model(config()).state_dict()
    parts = to_diffusers(state)
    joined = {f"{part}.{key}": tensor for part, weights in parts.items() for key, tensor in weights.items()}
    assert shapes_of(to_compvis(joined)) == shapes_of(weights_in(state))


def old_attention(key: str) -> str:
    names = (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn"))
    for new, old in names if "mid_block.attentions" in key else ():
        key = key.replace(f".{new}.", f".{old}.")
    return key


@pytest.mark.parametrize(
    ("part", "rename"),
    [
        ("vae", old_attention),
        ("vae", lambda key: f"vae.{key}"),
        ("vae", lambda key: f"first_stage_model.{key}"),
        ("unet", lambda key: f"unet.{key}"),
        ("text_encoder", lambda key: key.removeprefix("text_model.")),
        ("text_encoder", lambda key: f"text_encoder.{key}"),
        ("text_encoder", lambda key: f"cond_stage_model.transformer.{key}"),
        ("text_encoder", lambda key: f"cond_stage_model.transformer.{key.removeprefix('text_model.')}"),
        ("text_encoder", lambda key: f"transformer.{key}"),
    ],
)
def test_other_names_of_diffusers_weights(part: Any, rename: Callable[[str], str]) -> None:
    state = published("tiny_keys.json")
    weights = {rename(key): tensor for key, tensor in to_diffusers(state)[part].items()}
    own = {key: tensor for key, tensor in weights_in(state).items() if key.startswith(PREFIXES[part])}
    assert shapes_of(to_compvis(weights)) == shapes_of(own)


@pytest.mark.parametrize("prefix", ["", "vae.", "first_stage_model."])
def test_autoencoders_in_compvis_layout_with_any_prefix(prefix: str) -> None:
    own = {k: v for k, v in published("tiny_keys.json").items() if k.startswith("first_stage_model.")}
    file = {prefix + key.removeprefix("first_stage_model."): tensor for key, tensor in own.items()}
    assert to_compvis(file).keys() == own.keys()


def test_attention_matrices_become_convolutions_of_the_same_numbers(weights: State) -> None:
    own = weights["first_stage_model.encoder.mid.attn_1.q.weight"]
    theirs = to_diffusers(weights)["vae"]["encoder.mid_block.attentions.0.to_q.weight"]
    assert own.ndim == 4 and torch.equal(theirs, own.flatten(1))
    assert theirs.data_ptr() == own.data_ptr(), "no copy"


def test_of_a_whole_clip_the_text_encoder_is_taken() -> None:
    tower = to_diffusers(published("tiny_keys.json"))["text_encoder"]
    others = {
        "vision_model.encoder.layers.0.mlp.fc1.weight": torch.ones(2, 2),
        "visual_projection.weight": torch.ones(2, 2),
        "text_projection.weight": torch.ones(2, 2),
        "logit_scale": torch.ones(()),
    }
    assert to_compvis({**tower, **others}).keys() == to_compvis(tower).keys()


def test_two_tensors_for_one_weight_are_refused() -> None:
    norm = "final_layer_norm.weight"
    towers = {f"cond_stage_model.transformer.{name}": torch.ones(2) for name in (norm, f"text_model.{norm}")}
    with pytest.raises(CheckpointError, match=r"two tensors for cond_stage_model\.\S+final_layer_norm"):
        to_compvis(towers)
    with pytest.raises(CheckpointError, match="two tensors"):
        to_compvis(
            {"vae.quant_conv.weight": torch.ones(1), "first_stage_model.quant_conv.weight": torch.ones(1)}
        )


def test_a_weight_without_a_place_in_diffusers_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"model\.diffusion_model\.extra\.weight has no place"):
        to_diffusers({"model.diffusion_model.extra.weight": torch.ones(1)})


@pytest.mark.parametrize(
    "key",
    [
        f"down_blocks.{9**30}.resnets.0.conv1.weight",
        "input_blocks.7.0.op.weight",
        "down_blocks.x.y",
        "up_blocks.",
    ],
)
def test_forged_names_stay_as_they_are(key: str) -> None:
    state = {f"unet.{key}": torch.ones(1)}
    assert list(to_compvis(state)) == [f"model.diffusion_model.{key}"]


# --- files and folders --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """A small model's weights alone: no schedule, no position ids, as pruned files are."""
    return rebuilt_state_dict(build_model(small_config()))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, weights: State) -> Path:
    """A small model as a diffusers folder."""
    folder = tmp_path_factory.mktemp("diffusers")
    torch.save({"state_dict": weights}, folder / "small.ckpt")
    convert(read_model(folder / "small.ckpt"), small_config(), folder / "small", "diffusers")
    return folder / "small"


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """A copy of the folder that a test may change; its files are links."""
    return Path(shutil.copytree(written, tmp_path / "copy", copy_function=lambda a, b: Path(b).symlink_to(a)))


@pytest.fixture(scope="module")
def empty() -> Any:
    """A small model without weights."""
    return build_model(small_config())


def replace_weights(folder: Path, part: str, name: str, change: Callable[[State], Mapping[str, Any]]) -> None:
    """Replaces the safetensors file of a part by a file `name` with its changed weights."""
    (old,) = (folder / part).glob("*.safetensors")
    state = change({key: tensor.clone() for key, tensor in read_raw(old).items()})
    old.unlink()
    if name.endswith(".bin"):
        torch.save(state, folder / part / name)
    else:
        write_safetensors(folder / part / name, state, None, {"format": "pt"})


def read_raw(path: Path) -> State:
    from ldm.checkpoints.formats.read import read_checkpoint

    return read_checkpoint(path).state_dict


def change_config(path: Path, **changes: Any) -> None:
    config = {**json.loads(path.read_text()), **changes}
    path.unlink()
    path.write_text(json.dumps(config))


def assert_loads(path: Path, expected: State, **options: Any) -> None:
    loaded = load_model(small_config(), path, **options).state_dict()
    for key, tensor in expected.items():
        assert torch.equal(loaded[key], tensor.float()), key


def as_zip(state: State, path: Path) -> None:
    torch.save({"state_dict": dict(state), "global_step": 1}, path)


def as_legacy(state: State, path: Path) -> None:
    torch.save(dict(state), path, _use_new_zipfile_serialization=False)


def as_safetensors(state: State, path: Path) -> None:
    write_safetensors(path, state, None, {})


@pytest.mark.parametrize("save", [as_zip, as_legacy, as_safetensors, lambda s, p: torch.save(dict(s), p)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_single_files(weights: State, tmp_path: Path, save: Callable[..., None], dtype: torch.dtype) -> None:
    state = {key: tensor.to(dtype) for key, tensor in weights.items()}
    save(state, tmp_path / "named.anything")
    assert_loads(tmp_path / "named.anything", state)


def test_a_folder(written: Path, weights: State) -> None:
    assert_loads(written, weights)


def test_a_folder_of_bin_files_with_old_names(folder: Path, weights: State) -> None:
    def renamed(state: State) -> State:
        return {old_attention(key): tensor for key, tensor in state.items()}

    replace_weights(folder, "unet", "diffusion_pytorch_model.bin", dict)
    replace_weights(folder, "vae", "diffusion_pytorch_model.bin", renamed)
    replace_weights(folder, "text_encoder", "pytorch_model.bin", dict)
    assert_loads(folder, weights)


def test_a_folder_of_a_half_precision_variant(folder: Path, weights: State) -> None:
    def halved(state: State) -> State:
        return {key: tensor.half() for key, tensor in state.items()}

    for part, stem in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ):
        replace_weights(folder, part, f"{stem}.fp16.safetensors", halved)
    assert_loads(folder, {key: tensor.half() for key, tensor in weights.items()})


def test_full_precision_and_safetensors_are_preferred(folder: Path, weights: State) -> None:
    for name in ("diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.bin"):
        (folder / "unet" / name).write_bytes(b"never read")
    assert_loads(folder, weights)


def shard(folder: Path, index: str) -> None:
    names = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    state = read_raw(folder / "unet" / "diffusion_pytorch_model.safetensors")
    halves = [dict(list(state.items())[i::2]) for i in (0, 1)]
    for name, half in zip(names, halves, strict=True):
        write_safetensors(folder / "unet" / name, half, None, {})
    places = {key: name for name, half in zip(names, halves, strict=True) for key in half}
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (folder / "unet" / index).write_text(json.dumps({"metadata": {}, "weight_map": places}))


@pytest.mark.parametrize("variant", ["", ".fp16"])
def test_a_folder_with_a_model_in_shards(folder: Path, weights: State, variant: str) -> None:
    shard(folder, f"diffusion_pytorch_model.safetensors.index{variant}.json")
    assert_loads(folder, weights)
    assert len(model_files(folder)) == 4


@pytest.mark.parametrize("name", ["../vae/diffusion_pytorch_model.safetensors", "/etc/hostname", ".."])
def test_an_index_reaches_nothing_outside_of_its_folder(folder: Path, name: str) -> None:
    shard(folder, index := "diffusion_pytorch_model.safetensors.index.json")
    (folder / "unet" / index).write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(CheckpointError, match="outside of its folder"):
        read_model(folder)


def test_parts_in_files_of_their_own(written: Path, weights: State) -> None:
    unet = written / "unet" / "diffusion_pytorch_model.safetensors"
    vae = written / "vae" / "diffusion_pytorch_model.safetensors"
    text = written / "text_encoder" / "model.safetensors"
    assert_loads(unet, weights, vae=vae, text_encoder=text)
    assert_loads(written / "unet", weights, vae=written / "vae", text_encoder=written / "text_encoder")
    assert parts_in(read_model(text).state_dict) == {"text_encoder"}
    with pytest.raises(
        CheckpointError, match=r"has the U-Net, but no autoencoder and text encoder; .* --vae and --text"
    ):
        load_model(small_config(), unet)
    with pytest.raises(
        CheckpointError, match=r"has the autoencoder, but no U-Net and text encoder; give a whole model$"
    ):
        load_model(small_config(), vae)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory, weights: State) -> Path:
    """Another model, as a file and as a folder, and its parts as files."""
    place = tmp_path_factory.mktemp("other")
    state = {key: tensor + 1 for key, tensor in weights.items()}
    torch.save(state, place / "whole.ckpt")
    for part, prefix in PREFIXES.items():
        torch.save({k: v for k, v in state.items() if k.startswith(prefix)}, place / f"{part}.ckpt")
    convert(read_model(place / "whole.ckpt"), small_config(), place / "whole", "diffusers")
    return place


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
@pytest.mark.parametrize("source", ["whole", "whole/{}", "whole.ckpt", "{}.ckpt"])
def test_a_part_is_replaced(written: Path, other: Path, weights: State, part: Any, source: str) -> None:
    """The rest of the model is unchanged."""
    expected = {k: v + 1 if k.startswith(PREFIXES[part]) else v for k, v in weights.items()}
    assert_loads(written, expected, **{part: other / source.format(part)})


def test_what_cannot_take_the_place_of_a_part(written: Path, weights: State, tmp_path: Path) -> None:
    text = written / "text_encoder" / "model.safetensors"
    with pytest.raises(CheckpointError, match=r"model.safetensors: has no autoencoder: it is a text encoder"):
        read_model(written, vae=text)
    key = "first_stage_model.decoder.conv_in.weight"
    torch.save({**weights, key: torch.ones(1, 2)}, tmp_path / "vae.pt")
    with pytest.raises(
        CheckpointError, match=r"small with \S+vae\.pt: .*conv_in.* \[1, 2\], the model expects"
    ):
        load_model(small_config(), written, vae=tmp_path / "vae.pt")


# --- models that are not v1 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "changes", "reason"),
    [
        ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "sample.*predict the noise or v"),
        ("scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr: True"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "linear"}, "beta_schedule linear"),
        ("text_encoder/config.json", {"num_hidden_layers": 3}, "num_hidden_layers 3"),
        ("text_encoder/config.json", {"hidden_act": "gelu"}, "hidden_act gelu"),
        ("text_encoder/config.json", {"text_config": {"num_attention_heads": 2}}, "num_attention_heads 2"),
        ("unet/config.json", {"attention_head_dim": [5, 10, 20, 20]}, r"attention_head_dim \[5, 10, 20, 20\]"),
        ("unet/config.json", {"use_linear_projection": True}, "use_linear_projection True"),
        ("unet/config.json", {"time_cond_proj_dim": 256}, "time_cond_proj_dim 256"),
        ("unet/config.json", {"norm_num_groups": 16}, "norm_num_groups 16"),
        ("vae/config.json", {"scaling_factor": 0.13025}, "scaling_factor 0.13025"),
        ("model_index.json", {"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]}, "text_encoder_2"),
        ("model_index.json", {"transformer": ["diffusers", "SD3Transformer2DModel"]}, "with transformer; .* runs"),
        ("model_index.json", {"vae": ["diffusers", "AsymmetricAutoencoderKL"]}, "with AsymmetricAutoencoderKL"),
        ("model_index.json", {"unet": [None, None]}, "without unet"),
        ("model_index.json", {"_class_name": "X\x1b[2J", "unet": 3}, r"of X\\x1b\[2J without unet"),
    ],
)  # fmt: skip
def test_folders_of_other_models_are_named(
    empty: Any, folder: Path, file: str, changes: dict[str, Any], reason: str
) -> None:
    change_config(folder / file, **changes)
    with pytest.raises(CheckpointError, match=reason) as caught:
        check_fit(empty, read_model(folder))
    assert "\n" not in str(caught.value) and str(caught.value).startswith(str(folder))


def test_another_width_of_text_is_named_by_its_model(folder: Path) -> None:
    def widened(state: State) -> State:
        return {key: torch.zeros(v.shape[0], 1024) if "attn2.to_k" in key else v for key, v in state.items()}

    change_config(folder / "unet" / "config.json", cross_attention_dim=1024)
    replace_weights(folder, "unet", "diffusion_pytorch_model.safetensors", widened)
    with pytest.raises(CheckpointError, match=r"cross_attention_dim 1024.*it looks like Stable Diffusion v2"):
        load_model(small_config(), folder)


def test_missing_files_of_a_folder_are_named(folder: Path, tmp_path: Path) -> None:
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"holds no weights: neither diffusion_pytorch_model\.safetensors .* in vae$"
    ):
        read_model(folder)
    with pytest.raises(CheckpointError, match="holds no weights"):
        read_model(tmp_path)
    (folder / "model_index.json").unlink()
    (folder / "model_index.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="is not a JSON mapping"):
        read_model(folder)
    (folder / "model_index.json").write_bytes(b" " * (16 * 2**20 + 1))
    with pytest.raises(CheckpointError, match="larger than 16 MB"):
        read_model(folder)


@pytest.mark.parametrize(
    "name",
    [
        "model_index.json",
        "unet/config.json",
        "scheduler/scheduler_config.json",
        "tokenizer/vocab.json",
        "tokenizer/merges.txt",
        "tokenizer/tokenizer.json",
        "vae/diffusion_pytorch_model.safetensors.index.json",
    ],
)
def test_a_side_file_of_20_gb_is_refused_by_its_size(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the loader, and before that by the code that computes its checksum for the run file."""
    if name.endswith(".index.json"):
        (folder / name.replace(".index.json", "")).unlink()
    if name == "tokenizer/tokenizer.json":
        (folder / "tokenizer/vocab.json").unlink()
    (folder / name).unlink(missing_ok=True)
    (folder / name).touch()
    os.truncate(folder / name, 20 * 2**30)
    monkeypatch.setattr(hashing, "_digest", lambda path: pytest.fail(f"{path} is read as a whole"))
    with pytest.raises(InputError, match=rf"{name}.* is larger than 16 MB"):
        load_model(small_config(), folder).get_learned_conditioning(["a"])
    if name.startswith("tokenizer"):
        with pytest.raises(InputError, match=rf"{name} is larger than 16 MB"):
            file_digests(vocabulary_files(folder, None))


def test_a_single_file_of_another_model_is_named_not_advised(tmp_path: Path) -> None:
    state = {
        "model.diffusion_model.input_blocks.0.0.weight": torch.ones(2, 4, 3, 3),
        "first_stage_model.quant_conv.weight": torch.ones(1),
        "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight": torch.ones(1),
    }
    torch.save(state, tmp_path / "xl.ckpt")
    with pytest.raises(CheckpointError, match="it looks like SDXL") as caught:
        load_model(small_config(), tmp_path / "xl.ckpt")
    assert "--text_encoder" not in str(caught.value)


def test_a_folder_agrees_with_the_model_that_it_was_made_of(written: Path) -> None:
    check_fit(build_model(small_config()), read_model(written))
    with pytest.raises(CheckpointError, match="its unet has in_channels 4, and this config's model 9"):
        check_fit(build_model(inpainting_config(small_config())), read_model(written))


def test_v1s_settings_are_those_of_the_published_folders() -> None:
    configs = component_configs(build_model(read_config("configs/stable-diffusion/v1-inference.yaml")))
    expected = {
        "unet": {
            "act_fn": "silu",
            "attention_head_dim": 8,
            "block_out_channels": [320, 640, 1280, 1280],
            "center_input_sample": False,
            "cross_attention_dim": 768,
            "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
            "downsample_padding": 1,
            "flip_sin_to_cos": True,
            "freq_shift": 0,
            "in_channels": 4,
            "layers_per_block": 2,
            "norm_eps": 1e-05,
            "norm_num_groups": 32,
            "out_channels": 4,
            "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        },
        "vae": {
            "act_fn": "silu",
            "block_out_channels": [128, 256, 512, 512],
            "down_block_types": ["DownEncoderBlock2D"] * 4,
            "in_channels": 3,
            "latent_channels": 4,
            "layers_per_block": 2,
            "norm_num_groups": 32,
            "out_channels": 3,
            "scaling_factor": 0.18215,
            "up_block_types": ["UpDecoderBlock2D"] * 4,
        },
        "text_encoder": {
            "hidden_act": "quick_gelu",
            "hidden_size": 768,
            "intermediate_size": 3072,
            "layer_norm_eps": 1e-05,
            "max_position_embeddings": 77,
            "num_attention_heads": 12,
            "num_hidden_layers": 12,
            "vocab_size": 49408,
        },
        "scheduler": {
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "num_train_timesteps": 1000,
            "trained_betas": None,
        },
    }
    for component, settings in expected.items():
        assert {name: configs[component][name] for name in settings} == settings


# --- vocabularies -------------------------------------------------------------------------------------------------


def shapes_tokenizer_folder(folder: Path, one_file: bool) -> Path:
    shutil.copy("models/ldm/shapes/vocab.json", folder)
    shutil.copy("models/ldm/shapes/merges.txt", folder)
    if one_file:  # what transformers 5 writes
        vocabulary = json.loads((folder / "vocab.json").read_text())
        merges = [line.split(" ") for line in (folder / "merges.txt").read_text().splitlines()[1:]]
        table = {"model": {"type": "BPE", "vocab": vocabulary, "merges": merges}}
        (folder / "tokenizer.json").write_text(json.dumps(table))
        (folder / "vocab.json").unlink()
    return folder


@pytest.mark.parametrize("one_file", [False, True])
def test_a_folders_own_vocabulary_is_used(folder: Path, tmp_path: Path, one_file: bool) -> None:
    shutil.rmtree(folder / "tokenizer")
    (folder / "tokenizer").mkdir()
    shapes_tokenizer_folder(folder / "tokenizer", one_file)
    config = small_config()
    del config["params"]["cond_stage_config"]["params"]["version"]  # OpenAI's
    from ldm.modules.encoders.tokenizer import CLIPTokenizer

    model = load_model(config, folder)
    expected = CLIPTokenizer.from_folder("models/ldm/shapes")
    assert model.cond_stage_model.reader.encode("a red cube") == expected.encode("a red cube")


def test_a_vocabulary_of_another_size_is_refused(folder: Path) -> None:
    shutil.rmtree(folder / "tokenizer")
    (folder / "tokenizer").mkdir()
    shapes_tokenizer_folder(folder / "tokenizer", one_file=True)
    config = small_config()
    config["params"]["cond_stage_config"]["params"]["tokens"] = 900
    change_config(folder / "text_encoder" / "config.json", vocab_size=900)
    embedding = "text_model.embeddings.token_embedding.weight"
    replace_weights(
        folder,
        "text_encoder",
        "model.safetensors",
        lambda state: {**state, embedding: state[embedding][:900]},
    )
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: has 1000 entries, the text encoder 900"):
        load_model(config, folder)
    (folder / "tokenizer" / "tokenizer.json").write_text('{"model": {"vocab": 3}}')
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not a token table"):
        load_model(config, folder)
