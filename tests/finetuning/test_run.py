"""Whole trainings of the bundled model: killed and resumed ones end the same; faults are one line."""

import json
import os
import re
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.checkpoints.configs import config_for
from ldm.checkpoints.formats.read import read_checkpoint
from ldm.config import read_config
from ldm.data.captions import plain_caption
from ldm.data.scenes import render, scene_at
from ldm.finetuning import module as module_of_loop
from ldm.finetuning.batches import Batch
from ldm.finetuning.kinds import KINDS
from ldm.finetuning.logs import read_losses
from ldm.finetuning.settings import make_settings
from ldm.pipeline import load_model
from scripts.train import main
from tests.support.golden_data import relative_error, tiny_model
from tests.support.paths import ROOT

QUICK = ["--resolution", "64", "--precision", "full", "--no-checkpointing", "--quiet", "--seed", "3"]


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    for name, shape in (("a", (64, 64, 3)), ("b", (64, 64, 3)), ("c", (40, 90, 3))):
        Image.fromarray(rng.integers(256, size=shape, dtype=np.uint8)).save(f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(f"a red cube, {name}")
    return tmp_path


def train(kind, out, *options, steps=4):
    return main([kind, "--data", ".", "--out", out, "--steps", str(steps), *QUICK, *options])


def tensors(path):
    return read_checkpoint(path).state_dict


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("lora", ["--noise_offset", "0.05", "--flip"]),
        ("controlnet", ["--hint", "grey", "--ema_decay", "0.5"]),
    ],
)
def test_a_resumed_run_ends_as_an_unbroken_one(data, monkeypatch, kind, more):
    options = ["--batch_size", "2", "--accumulate", "2", *more]
    assert train(kind, "whole.safetensors", *options) == 0
    step = module_of_loop.FineTuning.optimizer_step

    def killed(self, *args, **kwargs):
        step(self, *args, **kwargs)
        if self.global_step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(module_of_loop.FineTuning, "optimizer_step", killed)
    assert train(kind, "broken.safetensors", *options) == 128 + signal.SIGINT
    assert not os.path.exists("broken.safetensors")
    monkeypatch.setattr(module_of_loop.FineTuning, "optimizer_step", step)
    assert train(kind, "broken.safetensors", *options, "--resume") == 0
    whole, broken = tensors("whole.safetensors"), tensors("broken.safetensors")
    assert whole.keys() == broken.keys()
    assert all(torch.equal(whole[key], broken[key]) for key in whole)
    losses = [
        [row[:3] for row in read_losses(data / f"{name}.training/loss.csv")] for name in ("whole", "broken")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 4


@pytest.mark.long
def test_time_that_is_over_leaves_a_state_and_no_file(data, capsys):
    assert train("lora", "x.safetensors", "--max_time", "00:00:00:01", steps=10**5) == 0
    said = capsys.readouterr().err.splitlines()[-1]
    assert "of 100000: the state is kept in x.training; add --resume" in said
    assert not os.path.exists("x.safetensors") and os.path.exists("x.training/last.ckpt")
    steps = read_losses(data / "x.training/loss.csv")[-1][0]
    assert train("lora", "x.safetensors", "--resume", steps=steps + 1) == 0
    assert read_checkpoint("x.safetensors").metadata["ss_steps"] == str(steps + 1)


def test_the_file_states_how_it_was_trained(data):
    assert train("lora", "ink.safetensors", "rank=3", "--alpha", "1.5", "--conv_rank", "2", steps=1) == 0
    notes = read_checkpoint("ink.safetensors").metadata
    expected = {"ss_network_dim": "3", "ss_network_alpha": "1.5", "ss_steps": "1", "ss_seed": "3"}
    expected |= {
        "ss_network_module": "networks.lora",
        "ss_num_train_images": "3",
        "ss_sd_model_name": "model.ckpt",
    }
    expected |= {"modelspec.architecture": "stable-diffusion-v1/lora", "ss_output_name": "ink"}
    assert expected.items() <= notes.items()
    assert json.loads(notes["ss_network_args"])["conv_dim"] == 2
    (tags,) = json.loads(notes["ss_tag_frequency"]).values()
    assert tags == {"a red cube": 3, "a": 1, "b": 1, "c": 1}
    assert {k.split(".")[0][:10] for k in tensors("ink.safetensors")} == {"lora_unet_"}


@pytest.mark.long
def test_a_whole_model_is_trained_and_read_back(data):
    assert train("finetune", "mine.ckpt", "--dtype", "fp32", "--ema_decay", "0.5", steps=2) == 0
    after = tensors("mine.ckpt")
    assert after["model.diffusion_model.out.2.weight"].dtype == torch.float32
    published = tensors(ROOT / "models/ldm/shapes/model.ckpt")
    assert published.keys() == after.keys()
    stored = torch.load("mine.ckpt", weights_only=True)["state_dict"]
    assert all(value.is_contiguous() for value in stored.values())  # trained in another order of axes
    changed = {key for key in after if not torch.equal(after[key].float(), published[key].float())}
    assert changed and all(key.startswith("model.diffusion_model.") for key in changed)


@pytest.mark.long
def test_an_inpainting_model_begins_as_the_model_for_text(data):
    options = ["--learning_rate", "0", "--weight_decay", "0", "--dtype", "fp32"]
    assert train("inpainting", "repaint.safetensors", *options, steps=1) == 0
    published, own = tensors(ROOT / "models/ldm/shapes/model.ckpt"), tensors("repaint.safetensors")
    first = "model.diffusion_model.input_blocks.0.0.weight"
    assert own[first].shape[1] == 9
    assert (
        config_for(own) == "configs/shapes/shapes-inpainting-inference.yaml"
    )  # so that --ckpt alone is enough
    load_model(read_config(config_for(own)), data / "repaint.safetensors")
    assert torch.equal(own[first][:, :4], published[first].float()) and not own[first][:, 4:].any()
    rest = [key for key in published if key != first]
    assert all(
        relative_error(own[key].float(), published[key].float()) < 1e-6
        for key in rest
        if published[key].any()
    )


@pytest.mark.long
def test_the_loss_of_one_batch_falls(tiny_batch):
    model, batch = tiny_batch
    part = KINDS["lora"].part(model, make_settings("lora", {"rank": 8}))
    module = module_of_loop.FineTuning(model, part, make_settings("lora", {"learning_rate": 1e-2}))
    module.log = lambda *args, **kwargs: None
    optimizer, losses = module_of_loop.make_optimizer(part.groups(), module.settings), []
    for _ in range(12):
        loss = module.training_step(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    part.module.remove()
    assert losses[-1] < 0.97 * losses[0]


@pytest.fixture
def tiny_batch():
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 2, 4, 8, 8, generator=generator)
    return tiny_model(), Batch(
        latents, ["a", "b"], torch.tensor([100, 700]), noise, torch.ones(2), [], [0, 0]
    )


def test_a_loss_that_is_not_finite_stops_and_keeps_the_state(data, monkeypatch, capsys):
    monkeypatch.setattr(
        module_of_loop.Objective, "__call__",
        lambda self, model, latents, *rest: latents.flatten(1).mean(1) * float("nan"),
    )  # fmt: skip
    assert train("lora", "x.safetensors") == 2
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .startswith("error: the loss is nan at step 1; the last good state")
    )
    assert not os.path.exists("x.safetensors")


@pytest.mark.long
def test_captions_with_sides_are_no_good_for_mirrored_images(data, capsys):
    (data / "a.txt").write_text("A cube Left of a ball")
    words = [word for word in QUICK if word != "--quiet"]
    assert main(["lora", "--data", ".", "--out", "x.safetensors", "--steps", "1", "--flip", *words]) == 0
    assert "1 captions say left or right, which is wrong of mirrored images" in capsys.readouterr().err
    assert main(["lora", "--data", ".", "--out", "y.safetensors", "--steps", "1", *words]) == 0
    assert "left or right" not in capsys.readouterr().err


def test_what_does_not_fit_the_model_is_said_before_images_are_encoded(data, capsys):
    assert train("lora", "x.safetensors", "--rank", "900") == 2
    assert "the rank 900 is larger than the layer's" in capsys.readouterr().err
    assert not list((data / "cache").rglob("*.npy"))


def test_an_optimiser_without_its_package_is_refused_at_once(data, monkeypatch, capsys):
    monkeypatch.setattr(module_of_loop, "find_spec", lambda name: None)
    assert train("lora", "x.safetensors", "--optimizer", "adamw8bit") == 2
    assert "adamw8bit needs the package bitsandbytes" in capsys.readouterr().err


@pytest.mark.long
def test_a_dry_run_reports_and_writes_nothing(data, capsys):
    (data / "a.txt").write_text("a red cube " * 30)
    before = sorted(data.glob("*.*"))
    shown = [word for word in QUICK if word != "--quiet"]
    assert main(["lora", "--data", ".", "--out", "x.safetensors", "--dry_run", *shown, "--steps", "10"]) == 0
    assert sorted(data.glob("*.*")) == before and not list(data.rglob("*.npy"))
    lines = capsys.readouterr().err.splitlines()
    assert "3 images, 3 batches an epoch, 3.33 epochs in 10 steps" in lines
    assert "1 captions are longer than the text encoder reads, and are cut" in lines
    assert lines[-1].startswith("about ") and lines[-1].endswith("GiB, by two steps with random values")


FULL = """
import resource, signal, sys
from scripts.train import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))
sys.exit(main(sys.argv[1:]))
"""
PEAK = """
import sys
from scripts.train import main
from ldm.runtime.memory import peak_resident
code = main(sys.argv[1:])
print("peak", peak_resident())
sys.exit(code)
"""


def same_training(data, other, words):
    """Whether `other` ended as one process does that makes a step of two batches."""
    assert main([*words, "--out", "one.safetensors", "--accumulate", "2", "--quiet"]) == 0
    one, both = tensors("one.safetensors"), tensors(f"{other}.safetensors")
    assert one.keys() == both.keys()
    for key in one:
        assert relative_error(both[key], one[key]) < 1e-4 or torch.equal(both[key], one[key]), key
    losses = [read_losses(data / f"{name}.training/loss.csv") for name in ("one", other)]
    assert [row[0] for row in losses[0]] == [row[0] for row in losses[1]] == [1, 2, 3]
    assert [row[1] for row in losses[0]] == pytest.approx([row[1] for row in losses[1]], rel=1e-5)


@pytest.fixture
def five(data):
    """Five images, and options for three steps on them."""
    for name in "de":
        Image.fromarray(np.full((64, 64, 3), ord(name), np.uint8)).save(f"{name}.png")
        (data / f"{name}.txt").write_text(f"a cube, {name}")
    options = "--data . --steps 3 --resolution 64 --precision full --seed 3 --dtype fp32 --device cpu"
    return options.split()


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [["lora"], ["lora", "--text_rate", "1e-4", "--clip_skip", "2"], ["controlnet", "--hint", "grey"]],
    ids=["unet", "text", "controlnet"],
)
def test_two_processes_make_the_steps_of_one_that_accumulates_two_batches(data, five, kind):
    script, words = str(ROOT / "scripts/train.py"), [*kind, *five]
    two = [sys.executable, script, *words, "--out", "two.safetensors", "--devices", "2"]
    done = subprocess.run(two, cwd=data, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("5 images, 5 batches an epoch") == 1
    same_training(data, "two", words)


@pytest.mark.long
def test_two_machines_make_the_steps_of_one_that_accumulates_two_batches(data, five):
    """Two nodes of torchrun, here both on this machine."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    words = ["lora", *five]
    nodes = []
    for rank in range(2):
        launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node_rank", str(rank)]
        launch += ["--nproc_per_node", "1", "--master_addr", "localhost", "--master_port", str(port)]
        launch += [str(ROOT / "scripts/train.py"), *words, "--out", "nodes.safetensors", "--num_nodes", "2"]
        nodes.append(subprocess.Popen(launch, cwd=data, text=True, stderr=subprocess.PIPE))
    said = [node.communicate(timeout=300)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert "".join(said).count("5 images, 5 batches an epoch") == 1
    same_training(data, "nodes", words)


@pytest.mark.long
def test_the_loss_falls_on_rendered_images(data):
    """A U-Net whose last layer is zero predicts nothing: its loss is the noise's variance, 1, until it learns."""
    blank = dict(tensors(ROOT / "models/ldm/shapes/model.ckpt"))
    blank["model.diffusion_model.out.2.weight"] = torch.zeros_like(
        blank["model.diffusion_model.out.2.weight"]
    )
    blank["model.diffusion_model.out.2.bias"] = torch.zeros_like(blank["model.diffusion_model.out.2.bias"])
    torch.save({"state_dict": blank}, data / "blank.ckpt")
    (data / "scenes").mkdir()
    for number in range(8):
        scene = scene_at(number, "train")
        Image.fromarray(render(scene, number, 64)).save(data / f"scenes/{number}.png")
        (data / f"scenes/{number}.txt").write_text(plain_caption(scene))
    words = ["finetune", "--data", "scenes", "--ckpt", "blank.ckpt", "--out", "own.safetensors", *QUICK]
    words += ["--steps", "20", "--batch_size", "8", "--learning_rate", "1e-3"]
    assert main(words) == 0
    losses = [row[1] for row in read_losses(data / "own.training/loss.csv")]
    assert losses[0] == pytest.approx(1, abs=0.05)
    assert np.mean(losses[-5:]) < 0.6


@pytest.mark.long
def test_tensorboard_has_the_rows_of_the_table(data):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert train("lora", "x.safetensors", "--tensorboard", "--accumulate", "2", steps=3) == 0
    found = events.EventAccumulator(str(data / "x.training/tensorboard")).Reload()
    rows = read_losses(data / "x.training/loss.csv")
    for column, name in enumerate(("loss", "learning_rate"), 1):
        logged = [(event.step, event.value) for event in found.Scalars(name)]
        assert logged == [(row[0], pytest.approx(row[column], rel=1e-5)) for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "finetune"])
def test_the_memory_and_time_of_a_dry_run_are_those_of_the_run(data, kind):
    """Memory within 10 %: that of Lightning's own objects and of the states that are saved is not in it."""
    ending = {"lora": "safetensors", "finetune": "ckpt"}[kind]
    words = [kind, "--data", ".", "--steps", "6", "--batch_size", "3", "--precision", "full"]
    words += ["--no-checkpointing", "--square", "--resolution", "128"]

    def run(*more):
        done = subprocess.run(
            [sys.executable, "-c", PEAK, *words, *more], cwd=data, text=True, capture_output=True, check=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        return done.stderr, int(done.stdout.split()[-1])

    told, _ = run("--dry_run", "--out", f"x.{ending}")
    _, peak = run("--out", f"x.{ending}")
    expected = float(re.search(r"and ([\d.]+) GiB, by two steps", told)[1]) * 2**30
    assert expected == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        (["lora", "--out", "x.safetensors"], "--data is missing; give a folder of images"),
        (["lora", "--data", "no", "--out", "x.safetensors"], "--data no is not a folder, a TOML file or a tar"),
        (["lora", "--data", ".", "--out", "x.ckpt"], "--out x.ckpt: a file of this kind ends in .safetensors"),
        (["lora", "--data", ".", "--out", "a.png"], "--out a.png: a file of this kind ends in .safetensors"),
        (["lora", "--data", ".", "--out", "no/x.safetensors"], "no does not exist"),
        (["lora", "--data", ".", "--out", "x.safetensors", "--resume"], "there is nothing to resume: x.training"),
        (["lora", "--data", ".", "--out", "x.safetensors", "--rank", "0"], "--rank 0: give 1 to 4096"),
        (["lora", "--data", ".", "--out", "x.safetensors", "rnak=3"], "unknown setting rnak of train lora"),
        (["lora", "--data", ".", "--out", "x.safetensors", "rank=many"], "rank is 'many'; give a whole number"),
        (["lora", "--data", ".", "--out", "x.safetensors", "--base", "no.yaml"], "there is no config no.yaml"),
        (["lora", "--data", ".", "--out", "x.safetensors", "--text_only"], "--text_rate is 0; give a rate"),
        (["lora", "--data", ".", "--out", "x.safetensors", "--rank", "900"], "the rank 900 is larger than the"),
        (["lora", "--data", ".", "--out", "x.safetensors", "--max_time", "1h"], "--max_time is 1h; write DD"),
        (["lora", "--data", ".", "--out", "x.safetensors", "--class_target", "model"], "give them with --class_data"),
        (["lora", "--data", ".", "--out", "x.safetensors", "--class_data", "no"], "--class_data no is not a folder"),
        (["embedding", "--data", ".", "--out", "x.safetensors"], "an embedding needs --word"),
        (["embedding", "--data", ".", "--out", "x.pt", "--word", "zog", "--init", "cube"], "no caption has the word"),
    ],
    ids=lambda typed: " ".join(typed) if isinstance(typed, list) else "",
)  # fmt: skip
def test_what_is_wrong_is_one_line(data, capsys, typed, line):
    assert main([*typed, *(QUICK if "--resolution" not in typed else [])]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ") and line in last


@pytest.mark.long
def test_an_image_that_changes_during_the_run_is_named(data, monkeypatch, capsys):
    step = module_of_loop.FineTuning.optimizer_step

    def changing(self, *args, **kwargs):
        step(self, *args, **kwargs)
        for name in "abc":
            Image.new("RGB", (64, 64), "red").save(data / f"{name}.png")

    monkeypatch.setattr(module_of_loop.FineTuning, "optimizer_step", changing)
    assert train("inpainting", "x.ckpt", "--checkpoint_steps", "1") == 2
    assert "has changed during the training; put it back as it was" in capsys.readouterr().err
    assert (data / "x.training/last.ckpt").exists() and not (data / "x.ckpt").exists()


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="limits of a process")
def test_a_full_disk_is_one_line(data):
    words = ["lora", "--data", ".", "--out", "x.safetensors", "--steps", "2", *QUICK]
    done = subprocess.run(
        [sys.executable, "-c", FULL, *words],
        cwd=data, text=True, capture_output=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "error: the state cannot be written to x.training/last.ckpt; make room on the disk, and add --resume"
    )
    assert sorted(path.name for path in (data / "x.training").iterdir()) == ["loss.csv", "settings.json"]


@pytest.mark.long
def test_a_resumed_run_has_the_settings_of_the_first(data, capsys):
    assert train("lora", "x.safetensors", "--checkpoint_steps", "1", steps=1) == 0
    os.remove("x.safetensors")
    stated = data / "x.training/settings.json"
    facts = json.loads(stated.read_text())
    del facts["class_target"]  # an earlier version did not know it
    stated.write_text(json.dumps(facts))
    assert train("lora", "x.safetensors", "--resume", "--rank", "3") == 2
    assert "--resume: rank was 8 and is 3; give it as it was" in capsys.readouterr().err
    assert train("lora", "x.safetensors", "--resume", steps=2) == 0


def test_nothing_is_overwritten(data, capsys):
    (data / "x.safetensors").write_bytes(b"mine")
    assert train("lora", "x.safetensors") == 2
    assert "--out x.safetensors exists" in capsys.readouterr().err
    assert (data / "x.safetensors").read_bytes() == b"mine"


def test_a_kind_that_does_not_exist_is_named(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["lroa", "--data", ".", "--out", "x.safetensors"])
    assert caught.value.code == 2
    assert "'lroa' is unknown (did you mean lora?)" in capsys.readouterr().err.splitlines()[-1]


def test_the_stages_of_the_bundled_model_may_be_named_as_such(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["shapes", "--help"])
    assert caught.value.code == 0
    assert "autoencoder" in capsys.readouterr().out
