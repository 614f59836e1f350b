"""The inpainting model: published keys, the original's figures, and the app's start noise."""

import numpy as np
import pytest
import torch

from ldm.checkpoints.load import skip_init
from ldm.config import read_config
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.noise import noise_source
from ldm.models.diffusion.passes import steps_to_run
from ldm.models.diffusion.plms import PLMSSampler
from ldm.util import InputError, instantiate_from_config
from tests.support.golden_data import TOLERANCE, figure, inpainting_config, keys, relative_error, tiny_model

INPAINT = "tiny_bert_inpaint.npz"


def test_published_keys():
    """The list was made with a text encoder without position ids in its state dict; released files have them."""
    with torch.device("meta"), skip_init():
        model = instantiate_from_config(read_config("configs/stable-diffusion/v1-inpainting-inference.yaml"))
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    del shapes["cond_stage_model.transformer.text_model.embeddings.position_ids"]
    assert shapes == keys("keys_inpaint.json")


def test_figures_of_the_original():
    model = tiny_model(inpainting_config())
    x, t, context, mask, masked = (
        figure(f"inpaint/{name}", INPAINT) for name in ("x", "t", "context", "mask", "masked_image_latent")
    )
    eps = model.apply_model(x, t, cond=model.hybrid_conditioning(context, mask, masked))
    assert relative_error(eps, figure("inpaint/eps", INPAINT)) <= TOLERANCE


def test_any_other_conditioning_is_refused():
    config = inpainting_config()
    config["params"]["conditioning_key"] = "crossattn"
    with pytest.raises(InputError, match="hybrid"), torch.device("meta"):
        instantiate_from_config(config)


def test_unknown_channels_are_refused():
    config = inpainting_config()
    config["params"]["concat_keys"] = ["mask", "maskd_image"]
    with pytest.raises(InputError, match="maskd_image"), torch.device("meta"):
        instantiate_from_config(config)


def test_start_noise_of_the_published_app():
    noise = noise_source("numpy", "batch", [7], "cpu").draw((2, 4, 8, 8))
    assert np.array_equal(noise, np.random.RandomState(7).randn(2, 4, 8, 8).astype(np.float32))


@pytest.mark.parametrize(
    ("strength", "run"), [(0, 0), (0.01, 0), (0.02, 1), (0.75, 37), (0.99, 49), (1, 50), (1.0, 50)]
)
def test_steps_that_a_strength_runs(strength, run):
    assert steps_to_run(strength, 50, 50) == run
    assert steps_to_run(strength, 50, 63) == (63 if strength == 1 else run)


@pytest.mark.parametrize("method", [DDIMSampler, PLMSSampler, DPMSolverSampler])
def test_a_perfect_model_gives_the_picture_back_from_any_strength(method):
    """With the true noise at every step, only the excess of the first noise level is left."""
    x0, noise = figure("sample/x0"), figure("img2img/noise")

    class Perfect:
        num_timesteps = 1000
        alphas_cumprod = torch.linspace(0.99999, 0.005, 1000)

        def apply_model(self, x, t, cond):
            alpha = sampler.table.alphas[np.abs(sampler.table.timesteps - float(t[0])).argmin()]
            return (x - alpha**0.5 * x0) / (1 - alpha) ** 0.5

    sampler = method(Perfect())
    sampler.make_schedule(20, verbose=False)
    for count in (1, 10, 19, 20):
        restored = sampler.decode(sampler.start_from(x0, count, noise), None, count)
        too_noisy = method.starts_above and count < 20  # by one level, of which this part is left
        left = sampler.table.alphas[count - 1] - sampler.table.alphas[count] if too_noisy else 0
        assert relative_error(restored, x0) < 0.01 + 2 * left


@pytest.mark.parametrize("method", [DDIMSampler, PLMSSampler, DPMSolverSampler])
def test_a_mask_keeps_a_latent_whatever_the_method(tiny, method):
    """The kept part reaches the last step at the noise level of that step, so it ends close to x0."""
    sampler, x0 = method(tiny), figure("sample/x0")
    sampler.make_schedule(5, verbose=False)
    mask = torch.zeros(2, 1, 8, 8)
    mask[..., :4] = 1
    latents = sampler.decode(
        figure("sample/x_T"),
        figure("sample/cond"),
        5,
        mask=mask,
        x0=x0,
        noise=noise_source("cpu", "batch", [1], "cpu"),
    )
    kept, made = latents[..., :4], latents[..., 4:]
    assert relative_error(kept, x0[..., :4]) < 0.2 * relative_error(made, x0[..., 4:])
