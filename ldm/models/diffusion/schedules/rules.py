"""The formula of each schedule: a number of steps and a model's trained levels -> the levels of the steps.

n steps have n levels from which a step begins, and where the last step ends: at sigma 0 unless stated otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ldm.models.diffusion.schedule import make_timesteps
from ldm.models.diffusion.schedules import Schedule
from ldm.models.diffusion.schedules.levels import Array, Levels, Trained
from ldm.util import InputError

Rule = Callable[[int, Trained, Schedule], Levels]

# Sabour et al. 2024, for Stable Diffusion 1.5: 10 steps
ALIGNED = (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029)
CONSISTENCY_STEPS = 50  # of the solver whose trajectories a latent consistency model was trained to shorten
BETA = 0.6  # both parameters of the beta distribution (Lee et al. 2024)


def original(steps: int, trained: Trained, schedule: Schedule) -> Levels:
    """The original's timesteps; the last step ends at the level of timestep 0."""
    times = make_timesteps(schedule.spacing, steps, len(trained.alphas))
    return trained.by_times(times[::-1], end=float(trained.alphas[0]))


def uniform(steps: int, trained: Trained, schedule: Schedule) -> Levels:
    """Even steps in time, fractional: k-diffusion's default, ComfyUI's normal."""
    return trained.by_times(np.linspace(trained.last, 0, steps))


def sgm_uniform(steps: int, trained: Trained, schedule: Schedule) -> Levels:
    """Even steps in time to timestep 0, which is left out."""
    return trained.by_times(np.linspace(trained.last, 0, steps + 1)[:-1])


def time_uniform(steps: int, trained: Trained, schedule: Schedule) -> Levels:
    """Even steps in time; the last one ends at the level of timestep 0 (the authors of DPM-Solver and UniPC)."""
    return trained.by_times(np.linspace(trained.last, 0, steps + 1)[:-1], end=float(trained.alphas[0]))


def karras(steps: int, trained: Trained, schedule: Schedule) -> Levels:
    """(max^(1/rho) + i/(n-1) (min^(1/rho) - max^(1/rho)))^rho: Karras et al. 2022, equation 5."""
    low, high = _range(trained, schedule)
    root = 1 / _rho(schedule)
    begin, end = math.pow(high, root), math.pow(low, root)
    return _ending_at_zero(trained, np.linspace(begin, end, steps) ** _rho(schedule))


def exponential(steps: int, trained: Trained, schedule: Schedule) -> Levels:
    """Even steps in log sigma."""
    low, high = _range(trained, schedule)
    return _ending_at_zero(trained, np.exp(np.linspace(math.log(high), math.log(low), steps)))


def polyexponential(steps: int, trained: Trained, schedule: Schedule) -> Levels:
    """exp(r^rho (log max - log min) + log min), r from 1 to 0 in even steps."""
    low, high = _range(trained, schedule)
    ramp = np.linspace(1, 0, steps) ** _rho(schedule)
    return _ending_at_zero(trained, np.exp(ramp * math.log(high / low) + math.log(low)))


def simple(steps: int, trained: Trained, schedule: Schedule) -> Levels:
    """The trained levels T - 1 - floor(i T/n)."""
    stride = len(trained.alphas) / steps
    return trained.by_times(np.array([trained.last - int(i * stride) for i in range(steps)]))


def ddim_uniform(steps: int, trained: Trained, schedule: Schedule) -> Levels:
    """The trained levels 1, 1 + T//n, 1 + 2 (T//n), ...: can be more than n."""
    return trained.by_times(np.arange(1, len(trained.alphas), len(trained.alphas) // steps)[::-1])


def beta(steps: int, trained: Trained, schedule: Schedule) -> Levels:
    """The trained levels round(Q(1 - i/n) (T - 1)), Q the quantiles of beta(0.6, 0.6); each once, so maybe fewer."""
    shares = quantiles(1 - np.linspace(0, 1, steps, endpoint=False), BETA, BETA)
    times = np.rint(shares * trained.last).astype(np.int64)
    return trained.by_times(np.unique(times)[::-1])


def beta_a1111(steps: int, trained: Trained, schedule: Schedule) -> Levels:
    """min + Q(1 - i/(n-1)) (max - min), Q the quantiles of beta(0.6, 0.6)."""
    low, high = _range(trained, schedule)
    return _ending_at_zero(trained, low + quantiles(np.linspace(1, 0, steps), BETA, BETA) * (high - low))


def kl_optimal(steps: int, trained: Trained, schedule: Schedule) -> Levels:
    """tan(i/(n-1) atan(min) + (1 - i/(n-1)) atan(max)) (Sabour et al. 2024)."""
    return _ending_at_zero(trained, _even_in_arctan(steps, trained, schedule))


def kl_optimal_a1111(steps: int, trained: Trained, schedule: Schedule) -> Levels:
    """The same with n + 1 points and no 0: the last step ends at the smallest sigma."""
    return trained.by_sigmas(_even_in_arctan(steps + 1, trained, schedule))


def align_your_steps(steps: int, trained: Trained, schedule: Schedule) -> Levels:
    """The table at n + 1 points, log sigma interpolated; the last is replaced by 0: 10 steps are the authors'."""
    return _ending_at_zero(trained, _aligned(steps + 1)[:-1])


def align_your_steps_a1111(steps: int, trained: Trained, schedule: Schedule) -> Levels:
    """The table at n points, then 0: 11 steps have all of the authors' levels."""
    return _ending_at_zero(trained, _aligned(steps))


def trailing(steps: int, trained: Trained, schedule: Schedule) -> Levels:
    """round(T - i T/n) - 1: the first step begins at the last timestep (Lin et al. 2024)."""
    total = len(trained.alphas)
    return trained.by_times(np.array([round(total - i * total / steps) - 1 for i in range(steps)]))


def lcm(steps: int, trained: Trained, schedule: Schedule) -> Levels:
    """Of the timesteps k, 2k, ..., 50k (less 1), k = T//50, from the last down: entries floor(50 i/n).

    With a share the first int(50 share) of them, as the authors' program for images (diffusers).
    """
    return trained.by_times(_consistency_times(steps, trained, schedule.share))


def tcd(steps: int, trained: Trained, schedule: Schedule) -> Levels:
    """The timesteps of lcm; the last step ends at the level of timestep 0."""
    return trained.by_times(_consistency_times(steps, trained, schedule.share), end=float(trained.alphas[0]))


def sigmas(steps: int, trained: Trained, schedule: Schedule) -> Levels:
    """The list as it is."""
    _check(schedule)
    return trained.by_sigmas(schedule.values)


def timesteps(steps: int, trained: Trained, schedule: Schedule) -> Levels:
    """The list, then sigma 0."""
    _check(schedule)
    if not 0 <= min(schedule.values) <= max(schedule.values) <= trained.last:
        raise InputError(f"timesteps are 0 to {trained.last}, not {_listed(schedule)}")
    values = np.asarray(schedule.values)
    return trained.by_times(values.astype(np.int64) if np.all(values == np.rint(values)) else values)


def quantiles(shares: Array, a: float, b: float) -> Array:
    """Returns the x [...] up to which the beta distribution (a, b) has these `shares` [...] of its weight."""
    low, high = np.zeros_like(shares), np.ones_like(shares)
    for _ in range(60):
        middle = (low + high) / 2
        below = _share_below(middle, a, b) < shares
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    # rounded so that the middle is 1/2 exactly, whose timestep is rounded to an even one
    return np.where(shares <= 0, 0.0, np.where(shares >= 1, 1.0, np.round((low + high) / 2, 14)))


def _share_below(x: Array, a: float, b: float) -> Array:
    """The regularised incomplete beta function, by its series around 0, or around 1 in the upper half."""
    whole = math.gamma(a) * math.gamma(b) / math.gamma(a + b)
    lower = _series(np.minimum(x, 0.5), a, b) / whole
    upper = 1 - _series(np.minimum(1 - x, 0.5), b, a) / whole
    return np.where(x <= 0.5, lower, upper)


def _series(x: Array, a: float, b: float) -> Array:
    """The integral of t^(a-1) (1-t)^(b-1) from 0 to x <= 1/2: x^a sum (1-b)_k / k! x^k / (a + k)."""
    k = np.arange(60)
    factors = np.append(1.0, np.cumprod((1 - b + k[:-1]) / (1 + k[:-1])))
    return x**a * (x[..., None] ** k @ (factors / (a + k)))


def _ending_at_zero(trained: Trained, values: Array) -> Levels:
    return trained.by_sigmas(np.append(values, 0.0))


def _range(trained: Trained, schedule: Schedule) -> tuple[float, float]:
    """The smallest and the largest sigma."""
    low = float(trained.sigmas[0]) if schedule.sigma_min is None else schedule.sigma_min
    high = float(trained.sigmas[-1]) if schedule.sigma_max is None else schedule.sigma_max
    if not 0 < low < high:
        raise InputError(
            f"sigma from {low:g} to {high:g} is not a range; the smallest must be above 0 and below the largest"
        )
    return low, high


def _rho(schedule: Schedule) -> float:
    rho = schedule.row.rho if schedule.rho is None else schedule.rho
    if rho is None or rho <= 0:
        raise InputError(f"rho must be above 0, not {rho}")
    return rho


def _even_in_arctan(points: int, trained: Trained, schedule: Schedule) -> Array:
    low, high = _range(trained, schedule)
    return np.tan(np.linspace(math.atan(high), math.atan(low), points))


def _aligned(points: int) -> Array:
    places = np.linspace(0, len(ALIGNED) - 1, points)
    return np.exp(np.interp(places, np.arange(len(ALIGNED)), np.log(ALIGNED)))


def _consistency_times(steps: int, trained: Trained, share: float) -> NDArray[np.int64]:
    count = int(CONSISTENCY_STEPS * share)
    if steps > count:
        at = f" at strength {share:g}" if share < 1 else ""
        cure = f"give 1 to {count}" if count else f"give at least {1 / CONSISTENCY_STEPS:g} as the strength"
        raise InputError(f"{steps} steps are not possible with the schedules lcm and tcd{at}; {cure}")
    origin = np.arange(1, count + 1) * (len(trained.alphas) // CONSISTENCY_STEPS) - 1
    entries = np.floor(np.linspace(0, count, steps, endpoint=False)).astype(np.int64)
    return origin[::-1][entries]


def _check(schedule: Schedule) -> None:
    values = schedule.values
    fewest = 2 if schedule.name == "sigmas" else 1
    falling = all(a > b for a, b in pairwise(values))
    if len(values) < fewest or not falling or not all(0 <= value < math.inf for value in values):
        raise InputError(
            f"{schedule.name} must fall, from {fewest} values on, and not below 0: {_listed(schedule)}"
        )


def _listed(schedule: Schedule) -> str:
    return ", ".join(f"{value:g}" for value in schedule.values) or "none given"
