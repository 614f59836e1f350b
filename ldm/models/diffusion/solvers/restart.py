"""Restart sampling (Xu et al. 2023, algorithm 1): Heun's steps, some of them repeated from more noise.

Where a run reaches sigma 0.1 it goes up to sigma 2 with fresh noise, and down again. As in AUTOMATIC1111's web UI the
number of steps is that which was asked for: with 20 steps or more 9 of them go down again once, with 36 or more a
quarter of them twice. The rest have the levels of Karras et al. 2022, equation 5, between the ends of the schedule.
With fewer than 20 steps it is Heun's method on the schedule as it is. Setting: s_noise (1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from torch import Tensor

from ldm.models.diffusion.sampler import TakeStep
from ldm.models.diffusion.sampling_run import SamplingRun
from ldm.models.diffusion.schedule import Step, StepTable
from ldm.models.diffusion.schedules.levels import alpha_of, sigma_of
from ldm.models.diffusion.solvers.heun import Heun

LOW, HIGH = 0.1, 2.0  # the levels between which steps are repeated
RHO = 7.0


class Restart(Heun):
    """Feeds the update rule as Heun does, on levels that rise again."""

    name = "restart"

    def _choose_table(self, steps: int, spacing: str, eta: float) -> StepTable:
        table = super()._choose_table(steps, spacing, eta)
        repeated, times = (len(table) // 4, 2) if len(table) >= 36 else (9, 1)
        if len(table) < 20:
            return table
        high = min(sigma_of(table.alphas[-1]), float(self._trained.sigmas[-1]))  # finite, without signal too
        levels = _karras(high, sigma_of(table.alphas[0]), len(table) - repeated * times)
        levels = [*levels, sigma_of(table.alphas_prev[0])]
        pairs = _with_repeats(levels, repeated, times)
        starts, ends = (
            np.array([alpha_of(sigma) for sigma in side])[::-1] for side in zip(*pairs, strict=True)
        )
        timesteps = self._trained.times_at([start for start, _ in pairs])[::-1]
        return StepTable(timesteps.copy(), starts.copy(), ends.copy(), np.zeros(len(pairs)))

    def _solve(self, run: SamplingRun) -> TakeStep:
        def take(x: Tensor, step: Step) -> tuple[Tensor, Tensor]:
            x, estimate = self._move(run, x, step)
            following = self.table.step(step.index - 1) if step.index else step
            if step.index and following.alpha < step.alpha_prev * (1 - 1e-9):
                x = run.add_noise(x, step.alpha_prev, following.alpha)
            return x, estimate

        return take


def _with_repeats(levels: Sequence[float], repeated: int, times: int) -> list[tuple[float, float]]:
    """Returns start and end of each step: from one of `levels` to the next, and again down to `LOW`."""
    low, high = (min(range(len(levels) - 1), key=lambda i: abs(levels[i] - place)) for place in (LOW, HIGH))
    again = _karras(levels[high], levels[low], repeated + 1) if high < low else []
    return [*pairwise(levels[: low + 1]), *times * list(pairwise(again)), *pairwise(levels[low:])]


def _karras(high: float, low: float, count: int) -> list[float]:
    begin, end = math.pow(high, 1 / RHO), math.pow(low, 1 / RHO)
    return (np.linspace(begin, end, count) ** RHO).tolist()
