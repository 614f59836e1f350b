"""The common parts of the solvers: levels as noise over signal, steps between them, and fresh noise.

In z = x / sqrt(alpha) and sigma = sqrt((1 - alpha) / alpha) the probability flow ODE is dz/dsigma = eps, and the
update rule of `sampling_run.py` is z_end = z + (end - start) eps. A solver decides which eps to feed to it. Where it
mixes clean latents D = z - sigma eps, the mixture D' is fed as eps' = (z - D') / sigma.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cached_property

from torch import Tensor

from ldm.models.diffusion.sampler import Sampler, TakeStep
from ldm.models.diffusion.sampling_run import SamplingRun
from ldm.models.diffusion.schedule import Step
from ldm.models.diffusion.schedules.levels import Trained, alpha_of


class Solver(Sampler):
    """A sampler that draws noise only where it is used; a subclass defines `_solve`."""

    draws_always = False
    starts_above = False

    def _stepper(self, run: SamplingRun) -> TakeStep:
        run.temperature *= self.settings.get("s_noise", 1.0)
        return self._solve(run)  # the same object, which is given the guidance of each step

    def _solve(self, run: SamplingRun) -> TakeStep:
        """Returns the function that runs a step; called once per run, so that history belongs to the run."""
        raise TypeError(f"{type(self).__name__} does not define _solve")

    @cached_property
    def _trained(self) -> Trained:
        return Trained(self._alphas_cumprod(), self.noise_schedule.rounded)

    def time(self, sigma: float) -> float:
        """Returns the timestep at which the model is called for a level inside a step, or at its end."""
        return float(self._trained.times_at(sigma))

    def part(self, step: Step, end: float) -> Step:
        """Returns the part of a step from its start to the level `end`, without fresh noise."""
        return replace(step, alpha_prev=alpha_of(end), sigma=0.0)


def with_fresh_noise(step: Step, fresh: float) -> Step:
    """Returns the step with this much of its final noise fresh, as noise over signal."""
    return replace(step, sigma=step.alpha_prev**0.5 * fresh)


def ancestral_noise(step: Step, eta: float) -> float:
    """Returns how much of a step's final noise is fresh if `eta` is 1 (DDPM's share), or less or more of it."""
    start, end = step.start, step.end
    return min(end, eta * end * (1 - (end / start) ** 2) ** 0.5)


def log_length(step: Step) -> float:
    """Returns the length of a step in -log sigma, half of the log of the signal-to-noise ratio."""
    return math.log(step.start / step.end)


class ChurningSolver(Solver):
    """A solver that can raise the noise before each step (Karras et al. 2022, algorithm 2); it defines `_move`.

    s_churn is spread over the steps of the run: a step at sigma begins at sigma (1 + s_churn / steps), at most at
    sqrt(2) sigma, if sigma is in s_tmin .. s_tmax.
    """

    def _solve(self, run: SamplingRun) -> TakeStep:
        steps = 0

        def take(x: Tensor, step: Step) -> tuple[Tensor, Tensor]:
            nonlocal steps
            steps = steps or step.index + 1
            return self._move(run, *self._churned(run, x, step, steps))

        return take

    def _churned(self, run: SamplingRun, x: Tensor, step: Step, steps: int) -> tuple[Tensor, Step]:
        settings, start = self.settings, step.start
        if settings["s_churn"] <= 0 or not settings["s_tmin"] <= start <= settings["s_tmax"]:
            return x, step
        raised = start * (1 + min(settings["s_churn"] / steps, 2**0.5 - 1))
        higher = replace(step, t=self.time(raised), alpha=alpha_of(raised))
        return run.add_noise(x, step.alpha, higher.alpha), higher

    def _move(self, run: SamplingRun, x: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """Runs one step; returns the next latent and the clean one."""
        raise TypeError(f"{type(self).__name__} does not define _move")
