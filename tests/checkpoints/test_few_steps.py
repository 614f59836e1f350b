"""Files of models that were made for few steps are known, and other settings than theirs are warned of."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ldm.checkpoints.few_steps import made_for
from ldm.checkpoints.inspect import inspect_path
from ldm.checkpoints.inspection_text import lines
from ldm.job import Job
from ldm.runs.notes import note_jobs

UNET = {"target": "x", "params": {}}
MODEL = {"params": {"unet_config": UNET, "first_stage_config": {"params": {"ddconfig": {"ch_mult": [1, 2]}}}}}
# as their authors' pages have them
FITTING = {
    "LCM": Job("", sampler="lcm", steps=4, scale=1.5),
    "TCD": Job("", sampler="tcd", steps=4, scale=1.0),
    "Hyper-SD, 1 step": Job("", sampler="tcd", steps=1, scale=1.0, eta=1.0),
    "Hyper-SD, 4 steps": Job("", sampler="ddim", schedule="trailing", steps=4, scale=1.0),
    "Hyper-SD, 8 steps with guidance": Job("", schedule="trailing", steps=8, scale=5.0),
}


@pytest.mark.parametrize(
    ("path", "notes", "kind"),
    [
        ("lcm-lora-sdv1-5.safetensors", {}, "LCM"),
        ("dreamshaper_8LCM.safetensors", {}, "LCM"),
        ("lcm-lora-sdv1-5/pytorch_lora_weights.safetensors", {}, "LCM"),
        ("SD15_TCD_LoRA.safetensors", {}, "TCD"),
        ("Hyper-SD15-1step-lora.safetensors", {}, "Hyper-SD, 1 step"),
        ("Hyper-SD15-4steps-lora.safetensors", {}, "Hyper-SD, 4 steps"),
        ("Hyper-SD15-8steps-CFG-lora.safetensors", {}, "Hyper-SD, 8 steps with guidance"),
        ("a.safetensors", {"ss_output_name": "my_lcm"}, "LCM"),
        ("a.safetensors", {"ss_training_comment": "Latent Consistency, 4 steps"}, "LCM"),
        ("a.safetensors", {"modelspec.title": "TCD LoRA"}, "TCD"),
        ("lcm/ink.safetensors", {}, None),
        ("calcmodel.safetensors", {"ss_output_name": "hyperreal"}, None),
    ],
)
def test_kinds_are_known_by_names_and_notes(path: str, notes: dict[str, str], kind: str | None) -> None:
    found = made_for(Path(path), notes)
    assert (found and found.kind) == kind
    if found is not None and kind is not None:
        assert found.misfits(FITTING[kind]) == []
        assert found.misfits(Job("", sampler="euler", steps=30, scale=7.5))[0] == "--sampler euler"


def test_a_guidance_scale_as_an_input_is_a_high_one() -> None:
    found = made_for(Path("any.safetensors"), {}, guided=True)
    assert found is not None and found.misfits(Job("", sampler="lcm", steps=4, scale=8.0)) == []
    assert found.misfits(Job("", sampler="lcm", steps=4, scale=1.0)) == ["--scale 1"]


def test_levels_of_the_user_are_theirs() -> None:
    found = made_for(Path("Hyper-SD15-1step-lora.safetensors"), {})
    assert (
        found is not None
        and found.misfits(Job("", sampler="tcd", timesteps=(800.0,), steps=1, scale=1.0)) == []
    )


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    names = ("alpha", "lora_down.weight", "lora_up.weight")
    tensors = {f"lora_unet_mid_block_attentions_0_proj_in.{name}": torch.ones(2, 2) for name in names}
    file = tmp_path / "fast.safetensors"
    save_file(tensors, file, {"ss_training_comment": "LCM distilled"})
    return file


def test_inspection_names_the_command_that_suits(lora: Path) -> None:
    (found,) = inspect_path(lora)
    assert (
        found.made_for == "LCM: up to 8 steps, guidance scale 1 to 2; --sampler lcm --ddim_steps 4 --scale 1"
    )
    assert any("made for" in line and "--sampler lcm" in line for line in lines(found))


def test_a_run_warns_once_of_each_file(lora: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of the first line that has the LoRA with other settings; not of its own settings, nor of weight 0."""
    used, unused = (("fast", 1.0, 1.0),), (("fast", 0.0, 0.0),)
    fitting = Job("a", sampler="lcm", steps=4, scale=1.0, loras=used)
    note_jobs([fitting, Job("b", loras=unused), Job("c")], MODEL, None, lambda name: lora)
    assert "few steps" not in caplog.text
    note_jobs([fitting, Job("d", loras=used), Job("e", steps=9, loras=used)], MODEL, None, lambda name: lora)
    assert caplog.text.count("was made for few steps") == 1
    assert (
        "the LoRA fast was made for few steps (LCM), not for --sampler ddim, --ddim_steps 50, --scale 7.5; "
        "use --sampler lcm --ddim_steps 4 --scale 1"
    ) in caplog.text


def test_a_run_warns_of_its_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    note_jobs([Job("a")], MODEL, tmp_path / "Hyper-SD15-4steps.safetensors")
    assert "the model was made for few steps (Hyper-SD, 4 steps)" in caplog.text
    caplog.clear()
    guided = {"params": {**MODEL["params"], "unet_config": {"params": {"time_cond_proj_dim": 256}}}}
    note_jobs([Job("a", sampler="lcm", steps=4, scale=1.0)], guided, None)
    assert "not for --scale 1; use --sampler lcm --ddim_steps 4 --scale 8" in caplog.text
