"""DPM-Solver++ with one prediction a step (Lu et al. 2022b, algorithm 2; k-diffusion), for clean latents D.

With h the length of a step in -log sigma, H = (1 + eta) h, and r the length of the step before over h:

    z_end = e^-H z + (1 - e^-H) D' + end sqrt(1 - e^(-2 eta h)) noise
    midpoint: D' = D + (D - D_1) / (2 r)
    Heun:     (1 - e^-H) (D' - D) = phi_2 (D - D_1) / r,  phi_2 = (e^-H - 1) / H + 1
    3M:       (1 - e^-H) (D' - D) = phi_2 d_1 - phi_3 d_2,  phi_3 = phi_2 / H - 1/2,  d_1 and d_2 the first and second
              differences over the last three, in units of h; Heun's while there are two

The first step and one to sigma 0 have D' = D. That is the update rule with fresh noise end sqrt(1 - e^(-2 eta h)).
2M is the midpoint form with eta 0. Settings of the others: eta, s_noise (1, 1).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

from torch import Tensor

from ldm.models.diffusion.sampler import TakeStep
from ldm.models.diffusion.sampling_run import SamplingRun, clean_latent, implied_noise
from ldm.models.diffusion.schedule import Step
from ldm.models.diffusion.solvers.base import Solver, log_length, with_fresh_noise

Known = tuple[Tensor, float]  # a clean latent, and the length of the step that began with it


class DPMpp2M(Solver):
    """Feeds the update rule with the noise that an extrapolated clean latent implies."""

    name = "dpmpp_2m"

    def _solve(self, run: SamplingRun) -> TakeStep:
        past: deque[Known] = deque(maxlen=2)  # newest first

        def take(x: Tensor, step: Step) -> tuple[Tensor, Tensor]:
            eps = run.predict(x, step.t, step.alpha)
            if step.end == 0:
                return run.advance(x, eps, step)
            clean, length = clean_latent(x, eps, step), log_length(step)
            if past:
                eps = implied_noise(x, clean + self._change(clean, length, past), step)
            past.appendleft((clean, length))
            fresh = step.end * (-math.expm1(-2 * self.eta * length)) ** 0.5
            return run.advance(x, eps, with_fresh_noise(step, fresh))

        return take

    def _change(self, clean: Tensor, length: float, past: Sequence[Known]) -> Tensor:
        """Returns D' - D from the clean latent of a step of this length and those of the steps before it."""
        before, length_before = past[0]
        return length / length_before / 2 * (clean - before)


class DPMpp2MSDE(DPMpp2M):
    """The midpoint form with fresh noise."""

    name = "dpmpp_2m_sde"


class DPMpp2MSDEHeun(DPMpp2M):
    """Heun's form with fresh noise."""

    name = "dpmpp_2m_sde_heun"

    def _change(self, clean: Tensor, length: float, past: Sequence[Known]) -> Tensor:
        before, length_before = past[0]
        whole, phi_2, _ = _phi(length * (1 + self.eta))
        return phi_2 / whole * (length / length_before) * (clean - before)


class DPMpp3MSDE(DPMpp2MSDEHeun):
    """A second difference as soon as there are three clean latents."""

    name = "dpmpp_3m_sde"

    def _change(self, clean: Tensor, length: float, past: Sequence[Known]) -> Tensor:
        if len(past) < 2:
            return super()._change(clean, length, past)
        (one, length_one), (two, length_two) = past
        r_one, r_two = length_one / length, length_two / length
        newer, older = (clean - one) / r_one, (one - two) / r_two
        second = (newer - older) / (r_one + r_two)
        whole, phi_2, phi_3 = _phi(length * (1 + self.eta))
        return (phi_2 * (newer + r_one * second) - phi_3 * second) / whole


def _phi(length: float) -> tuple[float, float, float]:
    """Returns 1 - e^-H, phi_2 and phi_3."""
    phi_2 = math.expm1(-length) / length + 1
    return -math.expm1(-length), phi_2, phi_2 / length - 0.5
