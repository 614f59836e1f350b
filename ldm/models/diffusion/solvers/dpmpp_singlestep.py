"""DPM-Solver++ with two predictions a step (Lu et al. 2022b, algorithm 1; k-diffusion), for clean latents D.

2S ancestral, with `down` and `fresh` of `euler.py`:

    mid = sqrt(start down);  z_2 = (mid/start) z + (1 - mid/start) D(z, start)
    z_end = (down/start) z + (1 - down/start) D(z_2, mid) + fresh noise

SDE, with r = 1/2: the same with fresh noise at the middle too, where mid = start^(1-r) end^r, and the last line has
(1 - 1/(2r)) D(z, start) + 1/(2r) D(z_2, mid). A step to sigma 0 is one of Euler's. Settings: eta, s_noise (1, 1);
SDE: r.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ldm.models.diffusion.sampler import TakeStep
from ldm.models.diffusion.sampling_run import SamplingRun, clean_latent, implied_noise
from ldm.models.diffusion.schedule import Step
from ldm.models.diffusion.solvers.base import Solver, ancestral_noise, with_fresh_noise


class DPMpp2SAncestral(Solver):
    """Feeds the update rule with the noise that the clean latent predicted at the middle implies."""

    name = "dpmpp_2s_a"

    def _solve(self, run: SamplingRun) -> TakeStep:
        def take(x: Tensor, step: Step) -> tuple[Tensor, Tensor]:
            fresh = ancestral_noise(step, self.eta)
            end = (step.end**2 - fresh**2) ** 0.5
            eps = run.predict(x, step.t, step.alpha)
            if end > 0:
                first = self.part(step, (step.start * end) ** 0.5)
                eps = implied_noise(x, _clean_after(self, run, x, eps, first), step)
            return run.advance(x, eps, with_fresh_noise(step, fresh))

        return take


class DPMppSDE(Solver):
    """Takes two ancestral steps, the second from the start again with what the first one found."""

    name = "dpmpp_sde"

    def _solve(self, run: SamplingRun) -> TakeStep:
        share = 1 / (2 * self.settings["r"])

        def take(x: Tensor, step: Step) -> tuple[Tensor, Tensor]:
            eps = run.predict(x, step.t, step.alpha)
            if step.end == 0:
                return run.advance(x, eps, step)
            first = self.part(step, step.start * (step.end / step.start) ** self.settings["r"])
            first = with_fresh_noise(first, ancestral_noise(first, self.eta))
            there = _clean_after(self, run, x, eps, first)
            mixed = (1 - share) * clean_latent(x, eps, step) + share * there
            fresh = ancestral_noise(step, self.eta)
            return run.advance(x, implied_noise(x, mixed, step), with_fresh_noise(step, fresh))

        return take


def _clean_after(solver: Solver, run: SamplingRun, x: Tensor, eps: Tensor, first: Step) -> Tensor:
    """Returns the clean latent that is predicted at the end of `first`."""
    ahead, _ = run.advance(x, eps, first)
    there = replace(first, alpha=first.alpha_prev)
    return clean_latent(ahead, run.predict(ahead, solver.time(first.end), there.alpha), there)
