"""Distillation to few steps: its loss by diffusers' schedulers, and the LoRA that it writes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler

from ldm.checkpoints.adapters.lora import LoraStack
from ldm.checkpoints.configs import BUNDLED_LORA
from ldm.job import Job
from ldm.pipeline import Pipeline
from ldm.training.diffusion import NoiseBatch
from ldm.training.distillation import ConsistencyTraining
from ldm.training.evaluate import Captioned
from ldm.training.lora import whole_lora
from ldm.training.lora_file import lora_tensors, write_lora
from ldm.training.quality import load_reader
from ldm.training.runs import Optimisation
from tests.support.paths import ROOT
from tests.support.training import tiny_model, tiny_vocabulary

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SHIPPED = ROOT / "models" / "ldm" / "shapes" / "lcm.safetensors"


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    return tiny_vocabulary(tmp_path_factory.mktemp("vocabulary"))


@pytest.fixture
def module(vocabulary):
    model = tiny_model(vocabulary)
    torch.nn.init.normal_(model.model.diffusion_model.out[-1].weight, std=0.1)  # new models predict zeros
    module = ConsistencyTraining(model, Optimisation(1e-3, 10), rank=2, scale=3.0)
    module.log = lambda *_, **__: None
    return module


def shaken(lora):
    with torch.no_grad():
        for part in lora.paths.values():
            part.up.normal_(std=0.05)


def test_the_loss_is_that_of_diffusers_schedulers(module):
    model, rng = module.model, torch.Generator().manual_seed(1)
    times = [999, 519, 39, 19]
    latents, noise = torch.randn(2, 4, 4, 8, 8, generator=rng)
    prompts = ["a red cube", "a blue sphere", "", "a cube"]
    batch = NoiseBatch(latents, prompts, torch.tensor(times) - 7, noise)
    ddim = DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False)
    ddim.set_timesteps(50)
    lcm = LCMScheduler(**BETAS, clip_sample=False)
    lcm.set_timesteps(50)
    texts, empty = model.get_learned_conditioning(prompts), model.get_learned_conditioning([""])
    errors = []
    with torch.no_grad():
        for i, t in enumerate(times):
            z = model.scale_factor * latents[i : i + 1]
            x = ddim.add_noise(z, noise[i : i + 1], torch.tensor([t]))

            def predict(x, t, text):
                return model.apply_model(x, torch.tensor([t]), text)

            def end(x, t, text):
                lcm._step_index = 0
                return lcm.step(predict(x, t, text), t, x, return_dict=True).denoised

            text, s = texts[i : i + 1], max(t - 20, 0)
            guided = predict(x, t, empty) + 3 * (predict(x, t, text) - predict(x, t, empty))
            lower = ddim.step(guided, t, x).prev_sample
            errors.append(end(x, t, text) - end(lower, s, text))
    expected = ((torch.cat(errors) ** 2 + 1e-6).sqrt() - 1e-3).mean()
    assert module.training_step(batch).item() == pytest.approx(expected.item(), rel=1e-4)


def test_only_the_lora_learns_and_it_can_be_switched_off(module):
    model, x = module.model, torch.randn(2, 4, 8, 8)
    t, text = torch.tensor([5, 800]), module.model.get_learned_conditioning(["a cube", "a sphere"])
    before = model.apply_model(x, t, text)
    shaken(module.lora)
    batch = NoiseBatch(x, ["a cube", "a sphere"], t, torch.randn_like(x))
    module.training_step(batch).backward()
    learned = {id(p) for p in module.parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert learned == {id(p) for p in module.lora.parameters()}
    with module.lora.off():
        assert torch.equal(model.apply_model(x, t, text), before)
    assert not torch.allclose(model.apply_model(x, t, text), before, atol=1e-3)


def test_the_file_changes_a_model_as_the_training_did(vocabulary, tmp_path, caplog):
    trained, fresh = tiny_model(vocabulary), tiny_model(vocabulary)
    lora = whole_lora(trained, rank=6)  # more than the last layer's 4 outputs
    shaken(lora)
    write_lora(tmp_path / "few.safetensors", lora_tensors(lora, trained, "kohya", torch.float16), {})
    LoraStack(fresh, lambda _: tmp_path / "few.safetensors").apply([("few", 1.0, 1.0)])
    assert "ignored" not in caplog.text
    changed = {
        name
        for name, layer in trained.model.diffusion_model.named_modules()
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)
    }
    assert len(lora.paths) == len(changed)
    for path, change in lora.paths.items():
        weight = trained.get_submodule(path).weight + change.difference().reshape_as(
            trained.get_submodule(path).weight
        )
        torch.testing.assert_close(fresh.get_submodule(path).weight, weight, atol=2e-4, rtol=2e-3)


@pytest.mark.long
def test_with_the_bundled_lora_4_steps_draw_more_right_images():
    assert SHIPPED.stat().st_size < 2**20
    pipeline = Pipeline.from_pretrained(safety=False)
    captioned = Captioned.draw(12, seed=50)
    reader = load_reader(ROOT / "models" / "ldm" / "shapes" / "judge.pt")

    def right(**settings):
        jobs = [
            Job(prompt, seed=50 + i, width=128, height=128, steps=4, **settings)
            for i, prompt in enumerate(captioned.prompts)
        ]
        images = np.stack([picture.pixels for picture in pipeline.make(jobs)])
        return sum(mark["all"] for mark in captioned.marks(reader, images))

    few = right(sampler="lcm", scale=1.0, loras=((str(SHIPPED), 1.0, 1.0),))
    assert few >= 10 and few > right(sampler="ddim", scale=7.5)


def test_the_bundled_lora_is_installed_with_the_package():
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    assert f'"{SHIPPED.name}"' in setup and Path(BUNDLED_LORA) == SHIPPED.relative_to(ROOT)
