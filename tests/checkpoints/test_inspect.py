"""Inspection of valid, damaged, foreign and hostile files; nothing in them is ever executed."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import pickletools
import random
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from ldm.checkpoints import hashing, inspect, inspection_hashes
from ldm.checkpoints.formats.detect import CheckpointError
from ldm.checkpoints.formats.imports import imports_of
from ldm.checkpoints.inspect import Inspection, inspect_path
from ldm.checkpoints.inspection_text import amount, lines
from ldm.checkpoints.layouts.recognise import V1, ModelKind
from ldm.checkpoints.load import build_model
from tests.support.checkpoint_files import call, named, save_like_lightning, text, tiny_state_dict, write_zip
from tests.support.golden_data import rebuilt_state_dict, small_config

DOWN = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def inspected(path: Path, **options: Any) -> Inspection:
    (found,) = inspect_path(path, **options)
    json.dumps(found.as_json())
    return found


def imports(path: Path) -> tuple[str, ...]:
    with path.open("rb") as file:
        return imports_of(file)


def test_a_training_checkpoint_is_described(tmp_path: Path) -> None:
    path = tmp_path / "m.ckpt"
    state = {**tiny_state_dict(), "model_ema.diffusion_modelout2bias": torch.ones(3)}
    save_like_lightning(path, state)
    found = inspected(path)
    assert found.sound and found.format == "torch zip" and found.size == path.stat().st_size
    assert found.kind.part == "model" and found.tensors == 983
    assert found.global_step == 470000 and found.ema
    count = {
        part: sum(tensor.numel() for key, tensor in state.items() if key.startswith(prefix))
        for part, prefix in {"EMA": "model_ema.", "U-Net": "model.", "text encoder": "cond_"}.items()
    }
    assert count.items() <= found.parameters.items()
    assert (
        sum(found.parameters.values())
        == sum(found.precisions.values())
        == sum(t.numel() for t in state.values())
    )
    assert "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint" in found.imports
    assert not found.foreign and found.metadata["pytorch-lightning_version"] == "1.4.2"


def test_averages_without_the_weights_are_told(tmp_path: Path) -> None:
    whole = {key: tensor for key, tensor in tiny_state_dict().items() if not key.startswith("model_ema.")}
    averages = {
        (
            f"model_ema.{key.removeprefix('model.').replace('.', '')}" if key.startswith("model.") else key
        ): tensor
        for key, tensor in whole.items()
    }
    torch.save(averages, tmp_path / "m.ckpt")
    found = inspected(tmp_path / "m.ckpt")
    assert found.kind.part == "model" and found.ema and found.only_ema
    assert any("no others of the U-Net" in line for line in lines(found))
    torch.save({**whole, **averages}, tmp_path / "m.ckpt")
    assert inspected(tmp_path / "m.ckpt").ema and not inspected(tmp_path / "m.ckpt").only_ema


def test_hashes_are_those_that_people_quote(tmp_path: Path) -> None:
    path = tmp_path / "m.ckpt"
    torch.save({"model.a": torch.randn(400_000)}, path)
    raw = path.read_bytes()
    whole = hashlib.sha256(raw).hexdigest()
    assert inspected(path).hashes == {
        "SHA-256": whole,
        "AutoV2": whole[:10],
        "A1111, old": hashlib.sha256(raw[0x100000 : 0x100000 + 0x10000]).hexdigest()[:8],
    }
    assert (
        set(inspected(path, deep=False).hashes) == {"A1111, old"} and not inspected(path, deep=False).checked
    )


def test_a_checksum_is_that_of_the_bytes_even_if_nothing_else_tells_that_they_changed(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    safetensors.torch.save_file({"a": torch.ones(9)}, path)
    first, before = inspected(path).hashes["SHA-256"], path.stat()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x40")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    found = inspected(path).hashes["SHA-256"]
    assert found == hashlib.sha256(path.read_bytes()).hexdigest() != first
    assert hashing.file_sha256(path) == found, "what others are told from now on"


@pytest.mark.parametrize(("entry", "prefix"), [("modelspec.hash_sha256", "0x"), ("sshs_model_hash", "")])
def test_a_noted_checksum_is_compared_with_the_weights(tmp_path: Path, entry: str, prefix: str) -> None:
    path = tmp_path / "m.safetensors"
    digest = prefix + hashlib.sha256(torch.arange(9.0).numpy().tobytes()).hexdigest()
    safetensors.torch.save_file({"a": torch.arange(9.0)}, path, {entry: digest})
    assert inspected(path).noted_hash_fits and inspected(path, deep=False).noted_hash_fits is None
    assert not any("not that of the weights" in line for line in lines(inspected(path)))
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x40")
    assert inspected(path).noted_hash_fits is False
    assert any("not that of the weights" in line for line in lines(inspected(path)))
    safetensors.torch.save_file({"a": torch.arange(9.0)}, path)
    assert inspected(path).noted_hash_fits is None


def test_a_lora_has_the_hash_of_its_weights_and_its_own_note(tmp_path: Path) -> None:
    path = tmp_path / "style.safetensors"
    tensors = {DOWN: torch.ones(4, 768)}
    metadata = {"ss_network_dim": "4", "sshs_model_hash": "f" * 64, "ss_tag_frequency": "x" * 5000}
    safetensors.torch.save_file(tensors, path, metadata)
    found = inspected(path)
    assert found.kind == ModelKind("LoRA", V1, "", "kohya") and found.parameters == {"U-Net": 4 * 768}
    assert found.hashes["A1111, LoRA"] == "f" * 12
    assert found.hashes["AutoV3"] == hashlib.sha256(torch.ones(4 * 768).numpy().tobytes()).hexdigest()[:12]
    assert found.metadata["ss_network_dim"] == "4"
    tags = found.metadata["ss_tag_frequency"]
    assert len(tags) < 400 and tags.endswith("(5,000 characters)")


def test_a_file_of_a_known_checksum_is_called_by_its_published_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    v1_4 = "fe4efff1e174c627256e44ec2991ba279b3816e364b49f9be2abc0b3ff3f8556"
    torch.save({"a": torch.ones(1)}, tmp_path / "m.ckpt")
    assert inspected(tmp_path / "m.ckpt").published == ""
    monkeypatch.setattr(inspection_hashes, "file_sha256", lambda path, again: v1_4)
    assert inspected(tmp_path / "m.ckpt").published == "sd-v1-4.ckpt"
    assert all(len(digest) == 64 and set(digest) <= set("0123456789abcdef") for digest in inspect.PUBLISHED)


def test_an_embedding_is_known_though_it_is_no_state_dict(tmp_path: Path) -> None:
    path = tmp_path / "cat.pt"
    tree = {
        "string_to_token": {"*": 265},
        "string_to_param": torch.nn.ParameterDict({"*": torch.ones(2, 768)}),
        "name": "cat",
        "step": 500,
    }
    torch.save(tree, path)
    found = inspected(path)
    assert found.kind == ModelKind("embedding", V1, "", "A1111") and found.sound and found.global_step == 500
    assert found.parameters == {"embedding": 1536} and found.metadata["name"] == "cat"
    assert found.hashes["A1111, embedding"] == found.hashes["SHA-256"][:12]


def test_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.ckpt"
    torch.save({"a": torch.full((1000,), 7.5), "b": torch.tensor([1.0, float("nan")])}, path)
    assert inspected(path).damaged == ("b",)
    whole = bytearray(path.read_bytes())
    whole[whole.index(torch.full((500,), 7.5).numpy().tobytes()) + 41] ^= 16
    path.write_bytes(whole)
    found = inspected(path)
    assert found.damaged == ("m/data/0",) and not found.sound and not found.refused
    assert inspected(path, deep=False).sound, "a quick look reads no weights"


EVIL = (
    b"\x80\x02}"
    + text("x")
    + call("os", "system", text("false"))
    + text("y")
    + named("builtins", "eval")
    + b"u."
)


def test_a_hostile_file_is_refused_and_everything_it_asks_for_is_listed(tmp_path: Path) -> None:
    found = inspected(write_zip(tmp_path / "evil.ckpt", EVIL))
    assert found.imports == found.foreign == ("os.system", "builtins.eval")
    assert found.format == "torch zip" and "os.system; refused" in found.refused and not found.sound
    assert any("2 names, 2 of them not allowed: os.system, builtins.eval" in line for line in lines(found))


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("false",)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_names_are_those_that_the_pickle_library_would_look_up(tmp_path: Path, protocol: int) -> None:
    value = [Evil(), collections_counter(), Evil(), {"os": "system", "note": ["builtins", "eval"]}]
    data = pickle.dumps(value, protocol)
    asked: list[str] = []

    class Watcher(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            asked.append(f"{module}.{name}")
            return lambda *_: None

    Watcher(__import__("io").BytesIO(data)).load()
    path = tmp_path / "m.ckpt"
    write_zip(path, data)
    assert imports(path) == tuple(dict.fromkeys(asked))


def collections_counter() -> Any:
    import collections

    return collections.Counter("a")


def test_names_are_found_in_every_kind_of_container(tmp_path: Path) -> None:
    path = tmp_path / "m"
    front = b"".join(pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {}))
    for raw in (front + EVIL + b"\x80\x02].", EVIL, pickletools.optimize(EVIL)):
        path.write_bytes(raw)
        assert imports(path) == ("os.system", "builtins.eval")
    whole = write_zip(path, EVIL).read_bytes()
    for length in (len(whole) - 1, len(whole) - 300):
        path.write_bytes(whole[:length])
        assert imports(path) == ("os.system", "builtins.eval"), "no zip directory at the end"
    path.write_bytes(whole.replace(b"false", b"truth"))
    assert imports(path) == ("os.system", "builtins.eval"), "a wrong checksum"
    write_zip(path, EVIL, compression=8)
    assert imports(path) == ("os.system", "builtins.eval")
    path.write_bytes(b"no pickle at all")
    assert imports(path) == ()


def test_hidden_names_are_marked_and_many_are_bounded(tmp_path: Path) -> None:
    path = tmp_path / "m"
    path.write_bytes(b"\x80\x04" + b"\x93.")
    assert imports(path) == ("?.?",)
    path.write_bytes(b"\x80\x02" + b"".join(named("m", f"n{i}") for i in range(2000)) + b".")
    assert len(imports(path)) == 1000


def test_any_damage_still_gets_an_answer(tmp_path: Path) -> None:
    save_like_lightning(tmp_path / "whole", {"a": torch.ones(3)})
    raw = (tmp_path / "whole").read_bytes()
    rng = random.Random(3)
    path = tmp_path / "m.ckpt"
    refused = 0
    for _ in range(300):
        data = bytearray(raw)
        for _ in range(4):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data[: rng.choice([len(data), rng.randrange(1, len(data))])])
        found = inspected(path, deep=False)
        assert "\n".join(lines(found)).replace("\n", "").isprintable()
        refused += bool(found.refused)
    assert 50 < refused < 300


def test_text_from_the_file_is_shown_escaped(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    safetensors.torch.save_file({"\x1b[2Ja": torch.tensor([float("nan")])}, path, {"\x1b[1m": "a\nb\u202e"})
    shown = list(lines(inspected(path)))
    assert all(line.isprintable() for line in shown) and any(r"a\nb\u202e" in line for line in shown)


def test_metadata_cannot_pose_as_a_finding(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    safetensors.torch.save_file({"a": torch.tensor([float("nan")])}, path, {"damage": "none found"})
    rows = [line for line in lines(inspected(path)) if line.startswith("  damage")]
    assert len(rows) == 1 and rows[0].endswith("1: a")


def test_whether_a_models_weights_fit_is_the_loaders_own_answer(
    tmp_path: Path,
) -> None:
    path, state = tmp_path / "m.ckpt", rebuilt_state_dict(build_model(small_config()))
    torch.save({**state, "extra.key": torch.ones(1)}, path)
    found = inspected(path, config_for=lambda kind: small_config())
    assert found.fits and found.sound and found.unexpected == ("extra.key",)
    key = next(key for key in state if key.startswith("first_stage_model.decoder"))
    del state[key]
    torch.save(state, path)
    found = inspected(path, config_for=lambda kind: small_config())
    assert found.fits is False and f"lacks 1 key ({key})" in found.problem and not found.sound
    assert inspected(path).fits is None


def test_a_diffusers_folder_is_the_sum_of_its_files(tmp_path: Path) -> None:
    width = {"down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": torch.ones(2, 768)}
    parts = {
        "unet/diffusion_pytorch_model": {**width, "conv_in.weight": torch.ones(2, 4, 3, 3)},
        "vae/diffusion_pytorch_model": {"decoder.up_blocks.0.resnets.0.norm1.weight": torch.ones(5).half()},
        "text_encoder/model": {"text_model.embeddings.token_embedding.weight": torch.ones(3, 768)},
    }
    classes = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}
    (tmp_path / "model_index.json").write_text(json.dumps({k: ["diffusers", v] for k, v in classes.items()}))
    for name, tensors in parts.items():
        (tmp_path / name).parent.mkdir()
        safetensors.torch.save_file(tensors, tmp_path / f"{name}.safetensors")
    whole, *files = inspect_path(tmp_path)
    assert whole.kind == ModelKind("model", V1, "", "diffusers") and whole.format == "diffusers folder"
    assert [file.kind.part for file in files] == ["U-Net", "autoencoder", "text encoder"]
    assert whole.parameters == {"U-Net": 1536 + 72, "autoencoder": 5, "text encoder": 2304}
    assert whole.precisions == {"float32": 1536 + 72 + 2304, "float16": 5} and whole.sound
    assert whole.size == sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("name", ["none.ckpt", "folder", "pipe"])
def test_what_is_no_file_is_an_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError):
        inspect_path(tmp_path / name)


def test_amounts_are_for_people() -> None:
    sizes = [0, 999, 1000, 22_932_860, 4_265_380_512]
    assert [amount(n) for n in sizes] == ["0 bytes", "999 bytes", "1 kB", "22.9 MB", "4.27 GB"]
