"""The benchmark: samples from real processes, and figures that follow from them."""

import json
import statistics
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

import scripts.benchmark as script
from ldm.benchmark import harness as benchmark
from ldm.benchmark.options import PEERS, Peer
from ldm.benchmark.report import Sample, ratios
from ldm.benchmark.subjects import Enough, Ours, Stopwatch, Work
from ldm.benchmark.weights import random_weight, write_image, write_random_checkpoint
from ldm.benchmark.worker import SUBJECTS, Worker
from ldm.checkpoints.formats.read import read_checkpoint
from ldm.checkpoints.load import load_into
from ldm.runtime.int8 import unsupported
from tests.support.golden_data import small_config, tiny_model

STEPS = 3
QUICK = ["--sizes", "64", "--steps", str(STEPS), "--device", "cpu", "--threads", "1", "--quiet"]


class InThisProcess:
    """Has the methods of a measured process, without starting one."""

    def __init__(self, setting):
        self._worker = Worker(replace(setting, spawned=time.time()))

    def ask(self, order, fields):
        return json.loads(json.dumps(getattr(self._worker, order)(**json.loads(json.dumps(fields)))))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.fixture
def measure(tmp_path):
    """Runs the script on a small model with random weights; returns its exit code and JSON lines."""
    config, lines = tmp_path / "tiny.yaml", tmp_path / "lines.jsonl"
    model = small_config()
    model["params"]["unet_config"]["params"]["num_heads"] = 2  # OpenVINO's 8 bits refuse heads of one channel
    OmegaConf.save(OmegaConf.create({"model": model}), config)
    files = ["--config", str(config), "--cache", str(tmp_path / "cache"), "--json", str(lines)]

    def run(*options):
        code = script.main([*QUICK, *files, *options])
        return code, [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []

    return run


def of_kind(lines, kind):
    return [line for line in lines if line["kind"] == kind]


@pytest.mark.long
@pytest.mark.parametrize("own", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_every_phase_of_our_own(measure, capfd, monkeypatch, own):
    """Measured in processes of their own, and in this one."""
    if not own:
        monkeypatch.setattr(benchmark, "Process", InThisProcess)
    code, lines = measure("--parts", "step,decode,whole", "--rounds", "1", "--precision", "full", "--check")
    assert code == 0
    live, fresh = of_kind(lines, "sample")
    assert (live["fresh"], fresh["fresh"]) == (False, True)
    both = {"text", "first step", "step", "unet", "decode"}
    assert set(live["seconds"]) == both
    assert set(fresh["seconds"]) == both | {
        "import", "load", "png", "start to first step", "whole run",
    }  # fmt: skip
    for sample in (live, fresh):
        assert len(sample["seconds"]["step"]) == STEPS - 1
        assert len(sample["seconds"]["unet"]) == STEPS
        assert sample["memory"]["resident"] > 2**20
    (facts,) = of_kind(lines, "facts")
    assert facts["runs in"] == "full"
    assert facts["threads"] == 1
    (error,) = of_kind(lines, "error")
    assert [error[name] for name in ("latents", "unet", "picture")] == [0, 0, 0]
    assert f"{statistics.median(live['seconds']['step']):.4f}" in capfd.readouterr().out


@pytest.mark.slow
def test_in_turns_with_diffusers(measure):
    pytest.importorskip("diffusers")
    options = ["--parts", "step,decode,whole", "--rounds", "2", "--precision", "full", "--check"]
    code, lines = measure(*options, "--peers", "diffusers")
    assert code == 0
    ours, peer = "ours full", "diffusers float32"
    samples = of_kind(lines, "sample")
    assert [s["subject"] for s in samples] == [ours, peer] * 4
    for ratio in of_kind(lines, "ratio"):
        medians = {
            (s["subject"], s["round"]): statistics.median(s["seconds"][ratio["phase"]])
            for s in samples
            if s["fresh"] == ratio["fresh"]
        }
        expected = [medians[ours, r] / medians[peer, r] for r in (1, 2)]
        assert ratio["rounds"] == pytest.approx(expected)
        assert ratio["median"] == pytest.approx(sum(expected) / 2)
        assert ratio["worst"] == pytest.approx(max(expected))
    # the same weights, noise and timesteps, so the same results
    errors = {line["subject"]: line for line in of_kind(lines, "error")}
    assert max(errors[peer][name] for name in ("latents", "unet", "picture")) < 1e-4


class Compiled(Ours):
    """A peer that is this toolkit, in float32, and that compiles its U-Net for each size once."""

    def __init__(self, setting):
        super().__init__(replace(setting, precision="full"))
        self.sizes = set()

    def make(self, work, noise):
        if work.size not in self.sizes:
            self.sizes.add(work.size)
            self.compiling = 12.5
        return super().make(work, noise)


@pytest.mark.long
def test_a_peer_that_compiles_and_one_that_is_missing(measure, capfd, monkeypatch):
    monkeypatch.setattr(benchmark, "Process", InThisProcess)
    monkeypatch.setitem(SUBJECTS, "compiled", Compiled)
    monkeypatch.setitem(PEERS, "compiled", Peer(("torch",)))
    monkeypatch.setitem(PEERS, "missing", Peer(("torch", "not_installed_here")))
    options = ["--parts", "step", "--rounds", "2", "--precision", "full", "--check"]
    code, lines = measure(*options, "--peers", "missing,compiled")
    assert code == 0
    out, _ = capfd.readouterr()
    assert "left out: missing needs not_installed_here: pip install not_installed_here" in out
    ours, peer = "ours full", "compiled float32"
    samples = of_kind(lines, "sample")
    assert [s["subject"] for s in samples] == [ours, peer] * 2
    assert [s["seconds"].get("compile") for s in samples] == [None, [12.5], None, None]
    (row,) = [line for line in out.splitlines() if line.startswith("compile ")]
    assert "12.5000" in row
    assert {line["phase"] for line in of_kind(lines, "ratio")} == {"text", "first step", "step", "unet"}
    errors = {line["subject"]: line for line in of_kind(lines, "error")}
    assert errors[peer]["unet"] == errors[ours]["unet"] == 0


def test_peers_are_checked_before_anything_is_made(measure, capsys):
    assert measure("--peers", "nobody") == (2, [])
    assert "unknown peer 'nobody'; choose from diffusers, openvino" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["full", "int8"])
def test_in_turns_with_openvino(measure, precision):
    pytest.importorskip("openvino")
    pytest.importorskip("diffusers")
    if precision == "int8":
        pytest.importorskip("nncf")
        if reason := unsupported():
            pytest.skip(reason)
    options = ["--parts", "step", "--rounds", "1", "--precision", precision, "--check"]
    code, lines = measure(*options, "--peers", "openvino")
    assert code == 0
    ours, peer = of_kind(lines, "sample")
    assert ours["subject"] == f"ours {precision}"
    assert peer["seconds"]["compile"][0] > 0
    errors = {line["subject"]: line["unet"] for line in of_kind(lines, "error")}
    low, high = (0, 1e-4) if precision == "full" else (1e-3, 0.5)
    assert low <= errors[peer["subject"]] < high


@pytest.mark.slow
def test_in_turns_with_zentorch(measure):
    pytest.importorskip("zentorch")
    pytest.importorskip("diffusers")
    options = ["--parts", "step", "--rounds", "1", "--precision", "full", "--check"]
    code, lines = measure(*options, "--peers", "zentorch")
    assert code == 0
    _, peer = of_kind(lines, "sample")
    assert peer["seconds"]["compile"][0] > peer["seconds"]["step"][0]
    errors = {line["subject"]: line["unet"] for line in of_kind(lines, "error")}
    assert errors["zentorch float32"] < 1e-4


class StableDiffusionCpp:
    """Calls of stable-diffusion-cpp-python, taking 5 (text), 2 (a step) and 3 seconds of `clock`."""

    clock = 0.0

    def __init__(self, model_path, wtype, n_threads, **_):
        assert read_checkpoint(model_path).state_dict
        assert (wtype, n_threads) == ("f32", 1)

    def generate_image(self, prompt, sample_steps, width, height, progress_callback, **_):
        type(self).clock += 5
        progress_callback(0, sample_steps, 0.0)
        for i in range(sample_steps):
            type(self).clock += 2
            progress_callback(i + 1, sample_steps, 2.0)
        type(self).clock += 3
        return [Image.new("RGB", (width, height))]


@pytest.mark.long
def test_phases_of_stable_diffusion_cpp(measure, capfd, monkeypatch):
    package = SimpleNamespace(StableDiffusion=StableDiffusionCpp, __version__="0")
    monkeypatch.setitem(sys.modules, "stable_diffusion_cpp", package)
    monkeypatch.setattr(benchmark, "_installed", lambda name: name == "stable_diffusion_cpp")
    monkeypatch.setattr(benchmark, "Process", InThisProcess)
    monkeypatch.setattr(Stopwatch, "mark", lambda _: StableDiffusionCpp.clock)
    options = ["--parts", "step,decode", "--rounds", "1", "--precision", "full", "--check"]
    assert measure(*options, "--peers", "sdcpp", "--batch", "2") == (2, [])
    code, lines = measure(*options, "--peers", "sdcpp")
    assert code == 0
    _, peer = of_kind(lines, "sample")
    assert peer["subject"] == "sdcpp f32"
    assert peer["seconds"] == {"text": [5], "first step": [2], "step": [2] * (STEPS - 1), "decode": [3]}
    assert [line["subject"] for line in of_kind(lines, "error")] == ["ours full"]
    assert "not compared" in capfd.readouterr().out


@pytest.mark.parametrize(("peer", "precision", "dtype", "type_"), [
    ("diffusers", "int8", "bfloat16", "bfloat16"),
    ("openvino", "int8", "bfloat16", "int8"),
    ("openvino", "autocast", "bfloat16", "bfloat16"),
    ("sdcpp", "int8", "bfloat16", "q8_0"),
    ("sdcpp", "autocast", "bfloat16", "f16"),
])  # fmt: skip
def test_a_peer_runs_in_the_nearest_type_that_it_has(peer, precision, dtype, type_):
    assert PEERS[peer].type_for(precision, dtype) == type_


@pytest.mark.slow
def test_pictures_in_turns_with_diffusers(measure):
    pytest.importorskip("diffusers")
    options = ["--mode", "img2img", "--parts", "whole", "--rounds", "1", "--precision", "full"]
    code, lines = measure(*options, "--peers", "diffusers", "--peer_recipe", "channels-last")
    assert code == 0
    for sample in of_kind(lines, "sample"):
        assert len(sample["seconds"]["unet"]) == 2  # of 3 steps at strength 0.75
        assert len(sample["seconds"]["encode"]) == 1


@pytest.mark.long
def test_settings_of_our_own_in_turns(measure, monkeypatch):
    monkeypatch.setattr(benchmark, "Process", InThisProcess)
    options = ["--parts", "step", "--steps", "4", "--rounds", "1", "--precision", "full", "--check"]
    code, lines = measure(*options, "--fast", "exact,balanced")
    assert code == 0
    both = ["ours full", "ours full balanced"]
    assert [sample["subject"] for sample in of_kind(lines, "sample")] == both
    assert {(line["ours"], line["peer"]) for line in of_kind(lines, "ratio")} == {tuple(reversed(both))}
    errors = {line["subject"]: line for line in of_kind(lines, "error")}
    assert errors[both[0]]["latents"] == 0 < errors[both[1]]["latents"]
    assert errors[both[1]]["unet"] == 0


def test_ratios_go_round_by_round():
    def sample(subject, number, *seconds):
        return Sample(subject, 64, number, False, {"step": seconds, "decode": ()}, {}, None)

    samples = [sample("a", 1, 1, 2, 9), sample("b", 1, 4), sample("a", 2, 6), sample("b", 2, 1, 3)]
    assert ratios(samples, "step", "a", "b") == [0.5, 3.0]
    assert ratios(samples, "decode", "a", "b") == []


def test_a_run_ends_behind_the_last_step_wanted():
    watch = Stopwatch(torch.device("cpu"))
    watch.start(Work(size=64, steps=9, limit=3, number=1, outdir=""))
    model = watch.timed("unet", lambda x: x + 1)
    done = []
    with pytest.raises(Enough):
        for i in range(9):
            done.append(model(i))
            watch.step()
    assert done == [1, 2, 3]
    assert {name: len(times) for name, times in watch.seconds().items()} == {
        "unet": 3, "first step": 1, "step": 2,
    }  # fmt: skip


def test_random_weights_keep_activations_in_size():
    x = torch.randn(64, 320, generator=torch.Generator().manual_seed(0))
    weight = random_weight("model.diffusion_model.some.weight", (1280, 320), torch.float32)
    assert float((x @ weight.T).std()) == pytest.approx(1, abs=0.02)
    assert abs(float(random_weight("norm.weight", (320,), torch.float32).mean()) - 1) < 0.01
    assert torch.equal(weight, random_weight("model.diffusion_model.some.weight", (1280, 320), torch.float32))
    assert not torch.equal(weight, random_weight("another.weight", (1280, 320), torch.float32))


def test_a_random_checkpoint_fills_a_model(tmp_path):
    path = tmp_path / "random.ckpt"
    write_random_checkpoint(path, small_config(), torch.bfloat16)
    model = tiny_model(small_config())
    load_into(model, read_checkpoint(path), dtype=torch.float32)  # refuses what is missing or left over
    key = "model.diffusion_model.out.2.weight"
    value = model.state_dict()[key]
    assert torch.equal(value, random_weight(key, value.shape, torch.bfloat16).float())
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_picture_to_start_from(tmp_path):
    write_image(tmp_path / "start.png")
    pixels = np.asarray(Image.open(tmp_path / "start.png"))
    assert pixels.shape == (512, 512, 3)
    assert pixels[-50:, :, 0].mean() > 200 > 50 > pixels[:50, :, 0].mean()


@pytest.mark.parametrize(("options", "word"), [
    (["--parts", "step,all"], "--parts"),
    (["--sizes", "64,60"], "60"),
    (["--sizes", "64,big"], "--sizes"),
    (["--steps", "1"], "--steps"),
    (["--rounds", "0"], "--rounds"),
    (["--fast", "exact,brisk"], "brisk"),
    (["--precision", "double"], "double"),
    (["--mode", "img2img", "--strength", "0.5"], "--strength"),
    (["--mode", "img2img", "--check"], "--check"),
])  # fmt: skip
def test_wrong_options_are_one_line(measure, capsys, options, word):
    code, lines = measure(*options)
    message = capsys.readouterr().err
    assert (code, lines) == (2, [])
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    assert word in message


def test_a_missing_peer_is_named(measure, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "_installed", lambda name: name != "diffusers")
    assert measure("--peers", "diffusers") == (2, [])
    assert "pip install diffusers" in capsys.readouterr().err


@pytest.mark.long
def test_a_fault_of_the_measured_process_is_passed_on(measure, capsys, tmp_path):
    assert measure("--ckpt", str(tmp_path / "none.ckpt"))[0] == 2
    assert "none.ckpt" in capsys.readouterr().err
