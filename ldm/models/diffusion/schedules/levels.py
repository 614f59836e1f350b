"""Levels of noise, the timesteps that belong to them, and a schedule's levels for a model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ldm.models.diffusion.schedules import Schedule
from ldm.util import InputError

Array = NDArray[np.floating]  # float64 throughout

# a model with zero terminal SNR has alpha 0, whose sigma is infinite: this is the largest finite one
SMALLEST_ALPHA = 2.0**-24


@cache
def example_alphas(total: int) -> Array:
    """Returns alphas [total] from which the number of a schedule's steps is found, as any model's have the same."""
    return np.linspace(0.999, 0.005, total)


def alpha_of(sigma: float) -> float:
    """Returns alpha of a level given as sigma."""
    return 1 / (1 + sigma**2)


def sigma_of(alpha: float) -> float:
    """Returns sigma of a level given as alpha: noise over signal."""
    return ((1 - alpha) / alpha) ** 0.5


@dataclass(frozen=True)
class Levels:
    """The levels of n steps from the noisiest down: `alphas` [n + 1], and `timesteps` [n] of all but the last."""

    timesteps: Array | NDArray[np.int64]
    alphas: Array

    def without_next_to_last(self) -> Levels:
        """Returns these levels but for the last one from which a step begins."""
        return Levels(self.timesteps[:-1], np.delete(self.alphas, -2))


@dataclass(frozen=True)
class Trained:
    """The levels that a model was trained on, alphas [T] in order of time, and the time at levels between them.

    Between two timesteps log sigma is interpolated, as in k-diffusion; with `rounded` times are whole.
    """

    alphas: Array
    rounded: bool = False

    @cached_property
    def sigmas(self) -> Array:
        alphas = np.maximum(self.alphas, SMALLEST_ALPHA)
        return np.sqrt((1 - alphas) / alphas)

    @cached_property
    def _log_sigmas(self) -> Array:
        return np.log(self.sigmas)

    @property
    def last(self) -> int:
        """The last timestep, the noisiest."""
        return len(self.alphas) - 1

    def times_at(self, sigmas: ArrayLike) -> Array:
        """Returns the timesteps at `sigmas`, fractional unless `rounded`; beyond the trained levels the nearest."""
        logs = np.log(np.maximum(np.asarray(sigmas), self.sigmas[0]))
        times = np.interp(logs, self._log_sigmas, np.arange(len(self.alphas)))
        return np.rint(times) if self.rounded else times

    def sigmas_at(self, times: ArrayLike) -> Array:
        """Returns sigma at `times`, which may be fractional."""
        return np.exp(np.interp(np.asarray(times), np.arange(len(self.alphas)), self._log_sigmas))

    def by_sigmas(self, sigmas: ArrayLike) -> Levels:
        """Returns the levels `sigmas` [n + 1]."""
        values = np.asarray(sigmas, dtype=np.float64)
        return Levels(self.times_at(values[:-1]), 1 / (1 + values**2))

    def by_times(self, times: ArrayLike, end: float = 1.0) -> Levels:
        """Returns the levels at `times` [n], and the alpha `end` after them."""
        values = np.asarray(times)
        if np.issubdtype(values.dtype, np.integer):
            return Levels(values, np.append(self.alphas[values], end))
        alphas = 1 / (1 + self.sigmas_at(values) ** 2)
        return Levels(np.rint(values) if self.rounded else values, np.append(alphas, end))


def levels_of(schedule: Schedule, steps: int, alphas_cumprod: Array) -> Levels:
    """Returns the levels of a schedule; see `Schedule.levels`."""
    from ldm.models.diffusion.schedules import rules

    trained = Trained(alphas_cumprod, schedule.rounded)
    rule: rules.Rule = getattr(rules, schedule.row.rule)
    if schedule.values:
        return rule(steps, trained, schedule)
    if not 1 <= steps < len(alphas_cumprod):
        raise InputError(f"{steps} steps are not possible; give 1 to {trained.last}")
    if schedule.discard_next_to_last:
        return rule(steps + 1, trained, schedule).without_next_to_last()
    return rule(steps, trained, schedule)
