"""Every figure of the original: relative L2 error at most 2e-5 in float32."""

import re

import numpy as np
import pytest
import torch

from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.schedule import StepTable, diffusion_buffers, make_beta_schedule, make_timesteps
from tests.support.golden_data import TOLERANCE, figure, figures, relative_error, sampled

# long runs, of which the short ones take every kind of step
SLOW = r"S50"
RUNS = [
    pytest.param(name, marks=pytest.mark.slow if re.search(SLOW, name) else ())
    for name in figures()
    if name.startswith("sample/") and "scale" in name
]
STRENGTHS = ("0.2", *(pytest.param(strength, marks=pytest.mark.slow) for strength in ("0.75", "0.98")))


@pytest.mark.parametrize("name", [key.split("/")[1] for key in figures() if key.startswith("schedule/")])
def test_diffusion_buffers(tiny, name):
    assert relative_error(getattr(tiny, name), figure(f"schedule/{name}")) <= TOLERANCE


@pytest.mark.parametrize(
    "setting", sorted({k.split("/")[1] for k in figures() if k.startswith("ddim_schedule/")})
)
def test_step_table(setting):
    steps, eta = (float(part.lstrip("Seta")) for part in setting.split("_"))
    expected = {
        key.split("/")[2]: value
        for key, value in figures().items()
        if key.startswith(f"ddim_schedule/{setting}/")
    }
    alphas_cumprod = diffusion_buffers(make_beta_schedule("linear", 1000, 0.00085, 0.012))["alphas_cumprod"]
    table = StepTable.build(
        alphas_cumprod.astype(np.float32).astype(np.float64), make_timesteps("compvis", int(steps)), eta
    )
    assert table.timesteps.tolist() == expected["timesteps"].tolist()
    assert relative_error(table.alphas, expected["ddim_alphas"]) <= TOLERANCE
    assert relative_error(table.alphas_prev, expected["ddim_alphas_prev"]) <= TOLERANCE
    assert np.allclose(table.sigmas, expected["ddim_sigmas"], rtol=TOLERANCE, atol=0)


@pytest.mark.parametrize("case", ["unet", "unet_wide"])
def test_unet(tiny, case):
    eps = tiny.apply_model(figure(f"{case}/x"), figure(f"{case}/t"), cond=figure(f"{case}/context"))
    assert relative_error(eps, figure(f"{case}/eps")) <= TOLERANCE


def test_autoencoder(tiny):
    posterior = tiny.encode_first_stage(figure("vae/image"))
    assert relative_error(posterior.mean, figure("vae/mean")) <= TOLERANCE
    assert relative_error(posterior.logvar, figure("vae/logvar")) <= TOLERANCE
    assert relative_error(tiny.decode_first_stage(figure("vae/z")), figure("vae/decoded")) <= TOLERANCE


def test_text(tiny):
    embedding = tiny.get_learned_conditioning(figures()["text/prompts"].tolist())
    assert relative_error(embedding, figure("text/embedding")) <= TOLERANCE


@pytest.mark.parametrize("name", RUNS)
def test_sampling(tiny, name):
    method, steps, scale = name.removeprefix("sample/").replace("_solver", "").split("_")
    spacing = "uniform" if method == "dpm" else "compvis"
    latents = sampled(tiny, method, int(steps[1:]), float(scale[5:]), ddim_discretize=spacing)
    assert relative_error(latents, figure(name)) <= TOLERANCE


def test_uniform_spacing_is_the_original_where_the_counts_agree(tiny):
    latents = sampled(tiny, "plms", 10, 7.5, ddim_discretize="uniform")
    assert relative_error(latents, figure("sample/plms_S10_scale7.5")) <= TOLERANCE


def test_eta(tiny):
    torch.manual_seed(7)
    latents = sampled(tiny, "ddim", 10, 7.5, eta=1.0)
    assert relative_error(latents, figure("sample/ddim_S10_eta1_torchseed7")) <= TOLERANCE


def test_mask(tiny):
    torch.manual_seed(7)
    latents = sampled(tiny, "ddim", 10, 7.5, mask=figure("sample/mask"), x0=figure("sample/x0"))
    assert relative_error(latents, figure("sample/ddim_S10_masked_torchseed7")) <= TOLERANCE


@pytest.mark.parametrize("strength", STRENGTHS)
def test_img2img(tiny, strength):
    sampler = DDIMSampler(tiny)
    sampler.make_schedule(50, verbose=False)
    count = int(float(strength) * 50)
    z = sampler.stochastic_encode(
        figure("sample/x0"), torch.tensor([count] * 2), noise=figure("img2img/noise")
    )
    assert relative_error(z, figure(f"img2img/strength{strength}/z_enc")) <= TOLERANCE
    latents = sampler.decode(
        z,
        figure("sample/cond"),
        count,
        unconditional_guidance_scale=5.0,
        unconditional_conditioning=figure("sample/uncond"),
    )
    assert relative_error(latents, figure(f"img2img/strength{strength}/decoded")) <= TOLERANCE


def test_q_sample(tiny):
    noisy = tiny.q_sample(figure("sample/x0"), torch.tensor([3, 700]), figure("img2img/noise"))
    assert relative_error(noisy, figure("q_sample/out")) <= TOLERANCE
