"""Timestep subsets: closed forms, and what the original did."""

import numpy as np
import pytest

from ldm.models.diffusion.schedule import ORIGINAL_EXACT_COUNTS, make_beta_schedule, make_timesteps
from ldm.util import InputError


@pytest.mark.parametrize("steps", range(1, 1000))
def test_uniform_runs_what_was_asked(steps):
    timesteps = make_timesteps("uniform", steps)
    assert len(set(timesteps.tolist())) == steps == len(timesteps)
    assert timesteps.min() >= 0
    assert timesteps.max() <= 999
    assert np.all(np.diff(timesteps) > 0)


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
