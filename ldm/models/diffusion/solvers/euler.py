"""Euler's method: one prediction a step (Song et al. 2021, equation 14; Karras et al. 2022, algorithm 2).

    z_end = z + (end - start) eps

It is DDIM with eta 0. The ancestral form takes DDPM's share of the noise out and puts fresh noise in its place, which
is DDIM with eta 1:

    fresh = min(end, eta sqrt(end^2 (start^2 - end^2) / start^2)),  down = sqrt(end^2 - fresh^2)
    z_end = z + (down - start) eps + fresh noise

Settings: s_churn, s_tmin, s_tmax and s_noise (0, 0, infinite, 1); ancestral: eta and s_noise (1, 1).
"""

from __future__ import annotations

from torch import Tensor

from ldm.models.diffusion.sampler import TakeStep
from ldm.models.diffusion.sampling_run import SamplingRun
from ldm.models.diffusion.schedule import Step
from ldm.models.diffusion.solvers.base import ChurningSolver, Solver, ancestral_noise, with_fresh_noise


class Euler(ChurningSolver):
    """Feeds the update rule with the prediction."""

    name = "euler"

    def _move(self, run: SamplingRun, x: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        return run.advance(x, run.predict(x, step.t, step.alpha), step)


class EulerAncestral(Solver):
    """Feeds the update rule with the prediction and DDPM's share of fresh noise, times eta."""

    name = "euler_a"

    def _solve(self, run: SamplingRun) -> TakeStep:
        eta = self.eta if "eta" in self.settings else 1.0

        def take(x: Tensor, step: Step) -> tuple[Tensor, Tensor]:
            fresh = ancestral_noise(step, eta)
            return run.advance(x, run.predict(x, step.t, step.alpha), with_fresh_noise(step, fresh))

        return take


class DDPM(EulerAncestral):
    """Ancestral sampling of DDPM (Ho et al. 2020, algorithm 2) with its smaller variance; it has no eta."""

    name = "ddpm"
