"""Solvers of models that were distilled to a few steps: they jump to a clean latent and add noise again.

LCM (Luo et al. 2023), with t the timestep and x_0 the predicted clean latent, s = 10 t:

    D = c_skip x + c_out x_0,  c_skip = 0.25 / (s^2 + 0.25),  c_out = s / sqrt(s^2 + 0.25)
    x_end = sqrt(alpha_end) D + sqrt(1 - alpha_end) noise

TCD (Zheng et al. 2024), with gamma = eta and u = floor((1 - eta) t_end) a timestep of less noise than the end:

    x_u = sqrt(alpha_u) x_0 + sqrt(1 - alpha_u) eps
    x_end = sqrt(alpha_end / alpha_u) x_u + sqrt(1 - alpha_end / alpha_u) noise

Both are the update rule with fresh noise. Their schedules are lcm and tcd, their guidance scales 1 to 2. Settings:
s_noise (1); TCD: eta (0.3).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, overload

from torch import Tensor

from ldm.models.diffusion.sampler import TakeStep
from ldm.models.diffusion.sampling_run import SamplingRun, clean_latent, implied_noise
from ldm.models.diffusion.schedule import Step
from ldm.models.diffusion.solvers.base import Solver

TIME_SCALE, VARIANCE = 10.0, 0.25  # of the boundary condition: D is x at timestep 0


@overload
def boundary(t: float) -> tuple[float, float]: ...
@overload
def boundary(t: Tensor) -> tuple[Tensor, Tensor]: ...
def boundary(t: Any) -> tuple[Any, Any]:
    """Returns c_skip and c_out at timestep t, or at several."""
    square = (TIME_SCALE * t) ** 2
    return VARIANCE / (square + VARIANCE), (square / (square + VARIANCE)) ** 0.5


class LCM(Solver):
    """All noise at the end of a step is fresh."""

    name = "lcm"

    def _solve(self, run: SamplingRun) -> TakeStep:
        def take(x: Tensor, step: Step) -> tuple[Tensor, Tensor]:
            clean = clean_latent(x, run.predict(x, step.t, step.alpha), step)
            skip, out = boundary(step.t)
            eps = implied_noise(x, skip * x + out * clean, step)
            return run.advance(x, eps, replace(step, sigma=(1 - step.alpha_prev) ** 0.5))

        return take


class TCD(Solver):
    """A part of the noise at the end of a step is fresh."""

    name = "tcd"

    def _solve(self, run: SamplingRun) -> TakeStep:
        def take(x: Tensor, step: Step) -> tuple[Tensor, Tensor]:
            alpha = step.alpha_prev
            if self.eta > 0:
                lower = math.floor((1 - self.eta) * step.t_prev)
                alpha = max(float(self._trained.alphas[lower]), alpha)
            fresh = replace(step, sigma=(1 - step.alpha_prev / alpha) ** 0.5)
            return run.advance(x, run.predict(x, step.t, step.alpha), fresh)

        return take
