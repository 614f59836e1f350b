"""The loss against diffusers' training functions, and against figures of the papers' formulas."""

import pytest
import torch

from ldm.finetuning.objective import Objective, snr_weights, velocity
from ldm.finetuning.settings import make_settings
from tests.support.golden_data import relative_error


@pytest.fixture(scope="module")
def scheduler():
    diffusers = pytest.importorskip("diffusers")
    return diffusers.DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def test_weights_by_signal_to_noise(tiny):
    eps, v = (snr_weights(tiny.alphas_cumprod, kind, 5.0) for kind in ("eps", "v"))
    assert (float(eps[100]), float(v[100])) == pytest.approx((0.59145, 0.52888), abs=2e-5)
    assert (float(eps[500]), float(v[500])) == pytest.approx((1.0, 0.27633), abs=2e-5)


def test_signal_to_noise_is_that_of_diffusers(tiny, scheduler):
    from diffusers.training_utils import compute_snr

    t = torch.arange(0, 1000, 7)
    snr = compute_snr(scheduler, t)
    assert (
        relative_error(
            1 / snr_weights(tiny.alphas_cumprod, "eps", debiased=True)[t] ** 2, snr.clamp(max=1000)
        )
        < 1e-5
    )
    assert relative_error(snr_weights(tiny.alphas_cumprod, "v", 5.0)[t], snr.clamp(max=5) / (snr + 1)) < 1e-5


def test_targets_are_those_of_diffusers(tiny, scheduler):
    x, noise = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0, 400, 999])
    assert relative_error(velocity(tiny, x, t, noise), scheduler.get_velocity(x, noise, t)) < 1e-6
    assert relative_error(tiny.q_sample(x, t, noise), scheduler.add_noise(x, noise, t)) < 1e-6


class Predictor:
    """A model whose prediction is known."""

    parameterization = "eps"

    def __init__(self, tiny, prediction):
        self.alphas_cumprod, self.q_sample = tiny.alphas_cumprod, tiny.q_sample
        self.prediction = prediction

    def apply_model(self, x, t, cond):
        return self.prediction


def test_the_loss_is_the_mean_of_squares_of_each_image(tiny):
    noise, predicted = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([3, 400, 900])
    expected = torch.nn.functional.mse_loss(predicted, noise, reduction="none").mean(dim=(1, 2, 3))
    loss = Objective()(Predictor(tiny, predicted), noise, t, noise, None)
    assert torch.allclose(loss, expected)
    huber = Objective(loss="huber")(Predictor(tiny, predicted), noise, t, noise, None)
    pseudo = 2 * 0.1 * (((predicted - noise) ** 2 + 0.1**2).sqrt() - 0.1)
    assert torch.allclose(huber, pseudo.mean(dim=(1, 2, 3)))


def test_the_rate_of_the_card_is_that_of_the_originals_schedule():
    from ldm.finetuning.module import rate_multiplier

    settings = make_settings("finetune", {"warm_up_steps": 10000, "steps": 400000})
    assert [rate_multiplier(settings, n) for n in (0, 5000, 10000, 399999)] == pytest.approx(
        [1e-6, 0.5, 1, 1], abs=1e-6
    )
