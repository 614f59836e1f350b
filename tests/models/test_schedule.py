"""Timestep subsets: closed forms, and the original's results."""

import numpy as np
import pytest
import torch

from ldm.models.diffusion.schedule import (
    ORIGINAL_EXACT_COUNTS,
    make_beta_schedule,
    make_timesteps,
    zero_terminal_snr,
)
from ldm.modules.diffusionmodules.util import (
    extract_into_tensor,
    make_ddim_sampling_parameters,
    make_ddim_timesteps,
    noise_like,
)
from ldm.util import InputError
from tests.support.golden_data import TOLERANCE, figure, figures, relative_error


def test_uniform_runs_what_was_asked():
    for steps in range(1, 1000):
        timesteps = make_timesteps("uniform", steps)
        assert len(timesteps) == steps
        assert timesteps.min() >= 0 and timesteps.max() <= 999, steps
        assert np.all(np.diff(timesteps) > 0), steps


def test_spacings_agree_exactly_where_the_original_was_exact():
    agree = []
    for steps in range(1, 1000):
        expected = [i + 1 for i in range(0, 1000, 1000 // steps)]
        if expected[-1] <= 999:
            assert make_timesteps("compvis", steps).tolist() == expected
            if make_timesteps("uniform", steps).tolist() == expected:
                agree.append(steps)
        else:
            with pytest.raises(InputError, match=r"use [0-9]+ steps"):
                make_timesteps("compvis", steps)
    assert tuple(agree) == ORIGINAL_EXACT_COUNTS


@pytest.mark.parametrize("steps", [-1, 0, 1000, 1001])
def test_impossible_counts_are_refused(steps):
    with pytest.raises(InputError, match=f"{steps} steps"):
        make_timesteps("uniform", steps)


def test_cosine_schedule_matches_its_closed_form():
    betas = make_beta_schedule("cosine", 1000)
    f = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    assert np.allclose(np.cumprod(1 - betas)[:-1], (f[1:] / f[0])[:-1], rtol=1e-9)
    assert betas.max() <= 0.999


# --- names that extensions of the original import -------------------------------------------------------------


@pytest.mark.parametrize("setting", ["S50_eta0.5", "S20_eta0.0", "S7_eta1.0"])
def test_sampling_parameters_of_the_original(setting):
    steps, eta = (float(part.lstrip("Seta")) for part in setting.split("_"))
    timesteps = make_ddim_timesteps("compvis", num_ddim_timesteps=int(steps), num_ddpm_timesteps=1000)
    assert timesteps.tolist() == figures()[f"ddim_schedule/{setting}/timesteps"].tolist()
    found = make_ddim_sampling_parameters(figure("schedule/alphas_cumprod"), timesteps, eta, verbose=False)
    for values, name in zip(found, ("ddim_sigmas", "ddim_alphas", "ddim_alphas_prev"), strict=True):
        assert relative_error(values, figure(f"ddim_schedule/{setting}/{name}")) <= TOLERANCE


def test_the_originals_name_gives_the_originals_list():
    for steps in (7, 30, 50, 60):
        expected = [i + 1 for i in range(0, 1000, 1000 // steps)]
        assert make_ddim_timesteps("uniform", steps, 1000).tolist() == expected


def test_sampling_parameters_have_the_types_of_the_original():
    """For a tensor: the types that an extension's `torch.sqrt` accepts."""
    table = torch.linspace(0.999, 0.005, 1000)
    timesteps = make_ddim_timesteps("uniform", 20, 1000)
    sigmas, alphas, before = make_ddim_sampling_parameters(table, timesteps, 0.7)
    assert (sigmas.dtype, alphas.dtype, before.dtype) == (torch.float64, torch.float32, np.float64)
    assert torch.equal(alphas, table[timesteps])
    expected = make_ddim_sampling_parameters(table.numpy(), timesteps, 0.7)
    assert np.array_equal(sigmas.numpy(), expected[0]) and np.array_equal(before, expected[2])


def test_names_that_nobody_ever_had():
    from ldm.modules.diffusionmodules import util

    with pytest.raises(AttributeError, match="make_no_timesteps"):
        _ = util.make_no_timesteps


def test_values_of_a_table_for_a_batch():
    table, t = torch.arange(10.0), torch.tensor([3, 7])
    assert extract_into_tensor(table, t, (2, 4, 8, 8)).tolist() == [[[[3.0]]], [[[7.0]]]]


def test_noise_that_is_repeated():
    torch.manual_seed(1)
    one = noise_like((1, 3, 2), "cpu")
    torch.manual_seed(1)
    assert torch.equal(noise_like((4, 3, 2), "cpu", repeat=True), one.expand(4, 3, 2))


def test_zero_terminal_snr_has_the_figures_of_its_algorithm():
    """Lin et al. 2024, algorithm 1, on Stable Diffusion's betas."""
    levels = np.cumprod(1 - zero_terminal_snr(make_beta_schedule("linear", 1000, 0.00085, 0.012)))
    assert levels[999] == 0
    assert levels[0] == pytest.approx(0.99914998, abs=3e-8)
    assert levels[500] ** 0.5 == pytest.approx(0.49093649, abs=3e-7)
