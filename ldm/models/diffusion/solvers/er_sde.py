"""ER-SDE-Solver-3 (Cui et al. 2023, in sigma, with the noise of ComfyUI), for clean latents D.

With phi(s) = s (e^(s^0.3) + 10) and r = phi(end) / phi(start):

    z_end = r z + (1 - r) D + (end - start + S phi(end)) d_1 + ((end - start)^2 / 2 + U phi(end)) d_2
            + sqrt(end^2 - r^2 start^2) noise
    S = integral of 1 / phi from end to start,  U = integral of (s - start) / phi(s)

d_1 and d_2 are the first and second differences of D by sigma over the last two and three steps; the integrals are
sums over 200 points, as in ComfyUI. That is the update rule with fresh noise. A step to sigma 0 has D alone.
Settings: order (3), s_noise (1).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from ldm.models.diffusion.sampler import TakeStep
from ldm.models.diffusion.sampling_run import SamplingRun, clean_latent, implied_noise
from ldm.models.diffusion.schedule import Step
from ldm.models.diffusion.solvers.base import Solver, with_fresh_noise
from ldm.util import InputError

POINTS = 200


class ERSDE(Solver):
    """Feeds the update rule with the noise that an extrapolated clean latent implies, and fresh noise."""

    name = "er_sde"

    def _solve(self, run: SamplingRun) -> TakeStep:
        order = self.settings["order"]
        if order not in (1, 2, 3):
            raise InputError(f"er_sde has orders 1 to 3, not {order:g}")
        past: deque[tuple[Tensor, float]] = deque(maxlen=int(order))  # clean, start; newest first

        def take(x: Tensor, step: Step) -> tuple[Tensor, Tensor]:
            eps = run.predict(x, step.t, step.alpha)
            if step.end == 0:
                return run.advance(x, eps, step)
            clean = clean_latent(x, eps, step)
            past.appendleft((clean, step.start))
            ratio = float(_phi(step.end) / _phi(step.start))
            if len(past) > 1:
                eps = implied_noise(x, clean + _change(past, step.end) / (1 - ratio), step)
            fresh = max(step.end**2 - (ratio * step.start) ** 2, 0.0) ** 0.5
            return run.advance(x, eps, with_fresh_noise(step, fresh))

        return take


def _phi(sigma: float | np.ndarray) -> float | np.ndarray:
    return sigma * (np.exp(sigma**0.3) + 10)


def _change(past: Sequence[tuple[Tensor, float]], end: float) -> Tensor:
    """Returns what the differences of the last two or three clean latents add to the step."""
    (clean, start), (one, start_one) = past[0], past[1]
    width = (start - end) / POINTS
    sigmas = end + width * np.arange(POINTS)
    first = (clean - one) / (start - start_one)
    total = (end - start + float(np.sum(1 / _phi(sigmas)) * width * _phi(end))) * first
    if len(past) > 2:
        two, start_two = past[2]
        second = (first - (one - two) / (start_one - start_two)) / ((start - start_two) / 2)
        moment = float(np.sum((sigmas - start) / _phi(sigmas)) * width * _phi(end))
        total = total + ((end - start) ** 2 / 2 + moment) * second
    return total
