"""Training of a TAESD: it comes closer to what the model itself decodes."""

from __future__ import annotations

from pathlib import Path

import torch

from ldm.training.autoencoder import psnr
from ldm.training.runs import Batches, Optimisation, RunSettings, fit, make_trainer
from ldm.training.taesd import TAESDTraining
from tests.support.golden_data import small_config, tiny_model


def test_training_brings_it_closer_to_the_decoder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = tiny_model(small_config())
    module = TAESDTraining(model, Optimisation(3e-3, steps=30, warm_up_steps=3), width=8, noise=0.0)
    x = torch.rand(2, 3, 32, 32) * 2 - 1

    @torch.inference_mode()
    def likeness() -> float:
        latents = model.get_first_stage_encoding(model.encode_first_stage(x).mode())
        made, true = 2 * module.networks["decoder"](latents) - 1, model.decode_first_stage(latents)
        return float(psnr(made, true).mean())

    before = likeness()
    trainer = make_trainer(RunSettings(tmp_path, steps=30, precision="32-true"))
    fit(trainer, module, Batches(lambda number, rng: x).loader())
    assert likeness() > before + 3  # dB: half of the squared error
    assert {key.split(".")[0] for key in module.state()} == {"taesd_encoder", "taesd_decoder"}
