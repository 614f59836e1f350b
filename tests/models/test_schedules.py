"""Noise schedules: k-diffusion's and ComfyUI's own figures, closed forms, and what is refused."""

import math

import numpy as np
import pytest

from ldm.models.diffusion.schedules import LISTS, SCHEDULES, Schedule
from ldm.models.diffusion.schedules.levels import Trained
from ldm.models.diffusion.schedules.rules import ALIGNED, quantiles
from ldm.util import InputError
from tests.support.gaussian import ALPHAS, SIGMAS
from tests.support.golden_data import keys

FORMULAS = [name for name in SCHEDULES if name not in LISTS]


def sigmas_of(schedule, steps):
    schedule = Schedule(schedule) if isinstance(schedule, str) else schedule
    alphas = schedule.levels(steps, ALPHAS).alphas
    return np.sqrt((1 - alphas) / alphas)


@pytest.mark.parametrize("name", sorted({key.rpartition("_")[0] for key in keys("schedules.json")}))
def test_figures_of_k_diffusion_and_comfyui(name):
    """ComfyUI computes in float32."""
    figures = {key: v for key, v in keys("schedules.json").items() if key.rpartition("_")[0] == name}
    for key, expected in figures.items():
        found = sigmas_of(name.removeprefix("comfy_"), int(key.rpartition("_")[2]))
        assert found == pytest.approx(expected, rel=1e-6 if "comfy" in name else 1e-12, abs=0), key
    assert len(figures) >= 5


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("steps", [1, 2, 7, 20, 50])
def test_levels_fall_and_have_their_timesteps(name, steps):
    levels = Schedule(name).levels(steps, ALPHAS)
    assert len(levels.alphas) == len(levels.timesteps) + 1
    assert np.all(np.diff(levels.alphas) > 0) and np.all(np.diff(levels.timesteps) < 0)
    if name not in ("ddim_uniform", "beta"):
        assert len(levels.timesteps) == steps
    sigmas = sigmas_of(name, steps)[:-1]
    inside = (sigmas <= SIGMAS[-1]) & (sigmas >= SIGMAS[0])
    assert np.exp(np.interp(levels.timesteps, np.arange(1000), np.log(SIGMAS)))[inside] == pytest.approx(
        sigmas[inside], rel=1e-9
    )


def test_timesteps_of_few_step_models():
    """As diffusers prints them."""
    expected = {1: [999], 2: [999, 499], 4: [999, 759, 499, 259], 8: [999, 879, 759, 639, 499, 379, 259, 139]}
    for steps, times in expected.items():
        for name in ("lcm", "tcd"):
            assert Schedule(name).levels(steps, ALPHAS).timesteps.tolist() == times
    assert Schedule("trailing").levels(4, ALPHAS).timesteps.tolist() == [999, 749, 499, 249]
    ends = [Schedule(name).levels(4, ALPHAS).alphas[-1] for name in ("lcm", "trailing", "tcd", "original")]
    assert ends == [1, 1, ALPHAS[0], ALPHAS[0]]


def test_two_meanings_of_align_your_steps():
    assert sigmas_of("align_your_steps", 10) == pytest.approx([*ALIGNED[:-1], 0])
    assert sigmas_of("align_your_steps_a1111", 11) == pytest.approx([*ALIGNED, 0])
    # half of the intervals: every second entry
    assert sigmas_of("align_your_steps", 5) == pytest.approx([*ALIGNED[:-1:2], 0])
    assert sigmas_of("align_your_steps_a1111", 6) == pytest.approx([*ALIGNED[::2], 0])


def test_two_meanings_of_kl_optimal():
    low, high = math.atan(SIGMAS[0]), math.atan(SIGMAS[-1])
    expected = [math.tan(i / 6 * low + (1 - i / 6) * high) for i in range(7)]
    assert sigmas_of("kl_optimal_a1111", 6) == pytest.approx(expected)
    assert sigmas_of("kl_optimal", 7) == pytest.approx([*expected, 0])


def test_two_meanings_of_beta():
    """The distribution's quantiles at 1, 3/4, 1/2, 1/4 (scipy.stats.beta.ppf, 0.6 and 0.6), and at 1, 1/2, 0."""
    quarter = 0.17568037865269498
    assert quantiles(np.array([1, 0.75, 0.5, 0.25, 0]), 0.6, 0.6) == pytest.approx(
        [1, 1 - quarter, 0.5, quarter, 0], rel=1e-12
    )
    assert Schedule("beta").levels(4, ALPHAS).timesteps.tolist() == [999, 823, 500, 176]
    middle = (SIGMAS[0] + SIGMAS[-1]) / 2
    assert sigmas_of("beta_a1111", 3) == pytest.approx([SIGMAS[-1], middle, SIGMAS[0], 0])


def test_the_next_to_last_level_is_left_out():
    whole = sigmas_of("karras", 11)
    found = Schedule("karras", discard_next_to_last=True).levels(10, ALPHAS)
    assert sigmas_of(Schedule("karras", discard_next_to_last=True), 10) == pytest.approx([*whole[:-2], 0])
    assert found.timesteps.tolist() == Schedule("karras").levels(11, ALPHAS).timesteps[:-1].tolist()


def test_settings_of_the_formulas():
    bounded = sigmas_of(Schedule("karras", sigma_min=0.1, sigma_max=10, rho=5), 3)
    assert bounded == pytest.approx([10, ((10**0.2 + 0.1**0.2) / 2) ** 5, 0.1, 0])
    assert sigmas_of(Schedule("polyexponential", rho=2), 3)[1] == pytest.approx(
        math.exp(math.log(SIGMAS[0]) + math.log(SIGMAS[-1] / SIGMAS[0]) / 4)
    )
    rounded = Schedule("karras", rounded=True).levels(10, ALPHAS)
    assert rounded.timesteps.tolist() == np.rint(Schedule("karras").levels(10, ALPHAS).timesteps).tolist()
    assert np.array_equal(rounded.alphas, Schedule("karras").levels(10, ALPHAS).alphas)
    assert Schedule("original", spacing="quad").levels(5, ALPHAS).timesteps.tolist() == [801, 451, 201, 51, 1]


def test_lists():
    assert sigmas_of(Schedule("sigmas", values=(9, 3, 0.5, 0)), 99) == pytest.approx([9, 3, 0.5, 0])
    levels = Schedule("timesteps", values=(800, 300)).levels(1, ALPHAS)
    assert levels.timesteps.tolist() == [800, 300] and levels.timesteps.dtype == np.int64
    assert levels.alphas.tolist() == [ALPHAS[800], ALPHAS[300], 1]
    assert Schedule("timesteps", values=(800.5, 300)).levels(1, ALPHAS).timesteps.tolist() == [800.5, 300]


def test_a_level_without_signal_is_finite():
    """Of a model with zero terminal SNR."""
    alphas = np.append(ALPHAS[:-1], 0.0)
    assert Trained(alphas).sigmas[-1] == pytest.approx(4096, rel=1e-6)
    for name in FORMULAS:
        assert np.all(np.isfinite(Schedule(name).levels(10, alphas).timesteps)), name


@pytest.mark.parametrize(
    ("schedule", "steps", "message"),
    [
        (Schedule("karas"), 10, "unknown schedule 'karas'; it is one of original, uniform"),
        (Schedule("karras"), 0, "0 steps are not possible; give 1 to 999"),
        (Schedule("karras", rho=0), 10, "rho must be above 0"),
        (Schedule("karras", sigma_min=3, sigma_max=2), 10, "sigma from 3 to 2 is not a range"),
        (Schedule("lcm"), 51, "51 steps are not possible with the schedules lcm and tcd; give 1 to 50"),
        (Schedule("sigmas", values=(1, 2)), 1, "sigmas must fall, from 2 values on, and not below 0: 1, 2"),
        (Schedule("timesteps", values=(1000, 5)), 2, "timesteps are 0 to 999, not 1000, 5"),
        (Schedule("timesteps", values=(5, 5)), 2, "timesteps must fall"),
        (Schedule("sigmas"), 3, "sigmas must fall, .*: none given"),
    ],
)
def test_what_is_refused(schedule, steps, message):
    with pytest.raises(InputError, match=message):
        schedule.levels(steps, ALPHAS)
