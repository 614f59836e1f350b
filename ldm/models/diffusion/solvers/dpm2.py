"""DPM-Solver-2 as in k-diffusion (Lu et al. 2022, algorithm 1; Karras et al. 2022): the prediction at the middle.

    mid = sqrt(start end);  z_2 = z + (mid - start) eps
    z_end = z + (end - start) eps(z_2, mid)

The ancestral form goes to `down` in place of `end` and adds fresh noise (see `euler.py`). A step to sigma 0,
or one that begins without signal, is one of Euler's. Settings: those of Euler, or of Euler ancestral.
"""

from __future__ import annotations

from torch import Tensor

from ldm.models.diffusion.sampler import TakeStep
from ldm.models.diffusion.sampling_run import SamplingRun
from ldm.models.diffusion.schedule import Step
from ldm.models.diffusion.solvers.base import ChurningSolver, Solver, ancestral_noise, with_fresh_noise


class DPM2(ChurningSolver):
    """Feeds the update rule with the prediction at the middle of the step, in log sigma."""

    name = "dpm2"

    def _move(self, run: SamplingRun, x: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        return run.advance(x, _predicted_at_middle(self, run, x, step, step.end), step)


class DPM2Ancestral(Solver):
    """The same to a lower level, and fresh noise up to the end of the step."""

    name = "dpm2_a"

    def _solve(self, run: SamplingRun) -> TakeStep:
        def take(x: Tensor, step: Step) -> tuple[Tensor, Tensor]:
            fresh = ancestral_noise(step, self.eta)
            eps = _predicted_at_middle(self, run, x, step, (step.end**2 - fresh**2) ** 0.5)
            return run.advance(x, eps, with_fresh_noise(step, fresh))

        return take


def _predicted_at_middle(solver: Solver, run: SamplingRun, x: Tensor, step: Step, end: float) -> Tensor:
    """Returns the prediction in the middle between a step's start and `end`; at the start if there is no middle."""
    eps = run.predict(x, step.t, step.alpha)
    if end == 0 or step.without_signal:
        return eps
    first = solver.part(step, (step.start * end) ** 0.5)
    middle, _ = run.advance(x, eps, first)
    return run.predict(middle, solver.time(first.end), first.alpha_prev)
