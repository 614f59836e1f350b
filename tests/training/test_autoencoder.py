"""Training of the autoencoder on a few images."""

import numpy as np
import pytest
import torch

from ldm.models.autoencoder import AutoencoderKL
from ldm.training.autoencoder import AutoencoderTraining, crop_batches, latent_scale, psnr, to_pixels
from ldm.training.runs import Batches, Optimisation, RunSettings, fit, make_trainer


def tiny_autoencoder():
    torch.manual_seed(0)
    config = {
        "double_z": True, "z_channels": 4, "resolution": 16, "in_channels": 3, "out_ch": 3, "ch": 32,
        "ch_mult": [1, 1], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0,
    }  # fmt: skip
    return AutoencoderKL(config, {"target": "torch.nn.Identity"}, embed_dim=4)


def gradients(count=4, side=24):
    """Smooth images: uint8 [count, side, side, 3]."""
    y, x = np.mgrid[:side, :side] / side
    return np.stack([np.stack([x, y, np.full_like(x, i / count)], -1) * 255 for i in range(count)]).astype(
        np.uint8
    )


@pytest.mark.long
def test_training_makes_the_reconstruction_better(tmp_path):
    images, model = gradients(), tiny_autoencoder()
    pixels = to_pixels(images)
    with torch.no_grad():
        before = psnr(model(pixels, sample_posterior=False)[0], pixels).mean()
    module = AutoencoderTraining(model, Optimisation(2e-3, steps=40, warm_up_steps=5))
    trainer = make_trainer(RunSettings(tmp_path, steps=40, precision="32-true"))
    fit(trainer, module, Batches(crop_batches(images, 4, 16, whole_from=30)).loader())
    with torch.no_grad():
        after = psnr(model(pixels, sample_posterior=False)[0], pixels).mean()
    assert after > before + 6  # dB: a quarter of the squared error


def test_windows_are_cut_from_the_pictures_until_whole_ones_come():
    images = gradients()
    make = crop_batches(images, batch_size=9, crop=8, whole_from=2)
    windows = make(1, np.random.default_rng(0))
    assert windows.shape == (9, 3, 8, 8)
    step = windows[:, 0].diff(dim=-1)  # red is x / side
    assert torch.allclose(step, torch.full_like(step, 255 / 24 / 127.5), atol=0.01)
    whole = make(2, np.random.default_rng(0))
    assert whole.shape == (1, 3, 24, 24)  # as many pixels as 9 windows
    assert any(torch.equal(whole[0], picture) for picture in to_pixels(images))


def test_psnr_of_a_known_error():
    x = torch.zeros(2, 3, 8, 8)
    assert psnr(x, x + 0.2).tolist() == pytest.approx([20.0, 20.0], abs=1e-4)  # 10 log10(2^2 / 0.2^2)


def test_the_scale_factor_makes_latents_one_wide():
    model, images = tiny_autoencoder(), gradients(8)
    with torch.no_grad():
        latents = model.encode(to_pixels(images)).mean
        model.quant_conv.bias[4:] -= 30  # no noise
    assert latent_scale(model, images, batch_size=3) == pytest.approx(1 / latents.std().item(), rel=1e-3)
