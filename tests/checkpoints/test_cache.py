"""Packed weights of a folder are those of the checkpoint as it is, and a run with them gives the same numbers."""

import os
import re
from pathlib import Path

import pytest
import torch

from ldm.checkpoints import cache
from ldm.checkpoints.cache import PackedWeights
from ldm.checkpoints.formats import tensor_bytes
from ldm.checkpoints.formats.tensor_bytes import forget
from ldm.pipeline import load_model
from ldm.runtime import int8, kernels, opaque
from ldm.runtime.prepare import prepare
from tests.support.golden_data import small_config, tiny_model
from tests.support.precision import needs_bf16_kernels, needs_int8_kernels

pytestmark = pytest.mark.skipif(not opaque.works(), reason="this torch cannot map packed weights")

EACH = [
    "float32",
    pytest.param("bfloat16", marks=needs_bf16_kernels),
    pytest.param("int8", marks=[needs_bf16_kernels, needs_int8_kernels]),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "small.ckpt"
    torch.save({"state_dict": tiny_model(small_config()).state_dict()}, path)
    return path


def drawn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def loaded(checkpoint, folder, kind="float32", budget=None):
    """The model, its packer, and the folder of its packed weights."""
    model = load_model(small_config(), checkpoint, dtype=None)
    files = None if folder is None else PackedWeights(folder, [checkpoint], [kind])
    dtype = torch.bfloat16 if kind == "int8" else getattr(torch, kind)
    packer = prepare(model, dtype, forget, budget, int8=kind == "int8", files=files)
    return model, packer, None if files is None else files.folder


def outputs(model, side=8):
    with torch.inference_mode():
        return [
            model.apply_model(drawn(1, 4, side, side), torch.tensor([500]), drawn(1, 77, 16)),
            model.decode_first_stage(drawn(1, 4, 2, 2)),  # more is slow in bf16 on many CPUs
            model.encode_first_stage(drawn(1, 3, 64, 64)).mean,
            model.get_learned_conditioning(["a red cube"]),
        ]


def equal(some, others):
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


@pytest.fixture(scope="module")
def written(tmp_path_factory, checkpoint):
    """The folder that a first process has written in float32, and the numbers of that process."""
    model, _, folder = loaded(checkpoint, tmp_path_factory.mktemp("cache") / "not" / "there")
    return folder, outputs(model)


@pytest.mark.parametrize("kind", EACH)
def test_the_same_numbers_without_packing(checkpoint, tmp_path, kind, monkeypatch):
    expected = outputs(loaded(checkpoint, None, kind)[0])
    assert equal(outputs(loaded(checkpoint, tmp_path, kind)[0]), expected)

    def fail(*args):
        raise AssertionError("a weight was packed again")

    for module in (kernels, int8):
        for name in ("pack_linear", "pack_convolution"):
            monkeypatch.setattr(module, name, fail)
    model, packer, folder = loaded(checkpoint, tmp_path, kind)
    assert equal(outputs(model), expected)
    assert packer is not None and packer.size > 0
    assert len(list(folder.iterdir())) > 100


@pytest.mark.parametrize("budget", [0, 10_000])
def test_weights_that_do_not_stay_are_mapped_at_each_use(checkpoint, written, budget, monkeypatch):
    given_back = []

    def recorded(tensor):
        if not tensor.is_inference():  # whose pages would stay
            given_back.append(tensor.data_ptr())
        tensor_bytes.forget(tensor)

    monkeypatch.setattr("tests.checkpoints.test_cache.forget", recorded)
    model, packer, folder = loaded(checkpoint, written[0].parent, budget=budget)
    for _ in range(2):
        assert equal(outputs(model), written[1])
        packer.drop(model)
    mapped = {address for address in given_back if _maps_of(address, folder)}
    assert len(mapped) > 50


def _maps_of(address, folder):
    """Whether an address is in a file of a folder that this process maps."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(part, 16) for part in line.split()[0].split("-"))
        if begin <= address < end:
            return str(folder) in line
    return False


def test_weights_begin_at_a_line_of_the_cpu_cache(written):
    files = [file.read_bytes() for file in written[0].iterdir()]
    assert all((8 + int.from_bytes(data[:8], "little")) % 64 == 0 for data in files)


def test_each_size_of_a_map_has_its_own_layout(checkpoint, tmp_path):
    model, _, folder = loaded(checkpoint, tmp_path)
    outputs(model)
    before = set(folder.iterdir())
    model, _, _ = loaded(checkpoint, tmp_path)
    assert equal(outputs(model, 16), outputs(loaded(checkpoint, None)[0], 16))
    users = {file.name.split("-")[1].split("x")[0] for file in set(folder.iterdir()) - before}
    assert users == {"PackedConv2d", "FastUpsample"}


@pytest.mark.parametrize("change", ["in place", "another object"])
def test_a_changed_weight_is_packed_anew(checkpoint, written, change):
    results = []
    for folder in (written[0].parent, None):
        model, _, _ = loaded(checkpoint, folder)
        layer = model.model.diffusion_model.input_blocks[0][0]
        with torch.no_grad():
            if change == "in place":
                layer.weight.mul_(2)
            else:
                layer.weight = torch.nn.Parameter(layer.weight * 2)
        results.append(outputs(model))
    assert equal(*results)
    assert not torch.equal(results[0][0], written[1][0])


def test_another_file_or_choice_has_a_folder_of_its_own(tmp_path):
    file, other = tmp_path / "a.ckpt", tmp_path / "b.ckpt"
    for path in (file, other):
        path.write_bytes(b"equal")
    names = {PackedWeights(tmp_path, [file], [choice]).folder for choice in ("auto", "off")}
    os.utime(file, ns=(1, 1))
    names.add(PackedWeights(tmp_path, [file], ["auto"]).folder)
    names.add(PackedWeights(tmp_path, [other], ["auto"]).folder)
    assert len(names) == 4


def _cut(data: bytes) -> bytes:
    return data[:-1]


def _described_otherwise(data: bytes) -> bytes:
    return re.sub(rb'(shape\\": \[)\d', rb"\g<1>x", data, count=1)


def _other_layout(data: bytes) -> bytes:
    start = re.search(rb'layout\\": \\"', data).end()
    return data[:start] + b"0" * 64 + data[start + 64 :]


@pytest.mark.parametrize(
    "damage", [_cut, _described_otherwise, _other_layout, lambda data: b"no safetensors"]
)
def test_a_damaged_weight_is_packed_again(checkpoint, written, tmp_path, damage, caplog):
    model, _, folder = loaded(checkpoint, tmp_path)
    good = {file.name: file.read_bytes() for file in written[0].iterdir()}
    for name, data in good.items():
        (folder / name).write_bytes(damage(data))
    assert equal(outputs(model), written[1])
    assert caplog.text.count("packed again") == 1
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == good


def test_a_full_disk_costs_the_cache_only(checkpoint, written, tmp_path, monkeypatch, caplog):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "write_safetensors", full)
    model, _, folder = loaded(checkpoint, tmp_path)
    assert equal(outputs(model), written[1])
    assert caplog.text.count("No space left") == 1
    assert not list(folder.iterdir())


@pytest.mark.skipif(os.name != "posix", reason="rights of files as on Unix")
def test_a_folder_that_everyone_can_write_to_is_not_used(checkpoint, written, tmp_path, caplog):
    _, _, folder = loaded(checkpoint, tmp_path)
    assert folder.stat().st_mode & 0o077 == 0
    folder.chmod(0o777)
    assert equal(outputs(loaded(checkpoint, tmp_path)[0]), written[1])
    assert "every user can write to it" in caplog.text
    assert not list(folder.iterdir())


def test_what_a_killed_run_left_is_removed(checkpoint, tmp_path):
    model, _, folder = loaded(checkpoint, tmp_path)
    left, other = folder / ".a.weight-x-float32.safetensors.0123abcd.part", folder / ".x.txt.0123abcd.part"
    for path in (left, other):
        path.touch()
    outputs(model)
    assert (left.exists(), other.exists()) == (False, True)
