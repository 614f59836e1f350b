"""Heun's method (Karras et al. 2022, algorithm 1): the mean of the predictions at both ends of a step.

    eps = eps(z, start);  z_2 = z + (end - start) eps
    z_end = z + (end - start) (eps + eps(z_2, end)) / 2

A step that ends at sigma 0, or begins without signal, is one of Euler's. Settings: those of Euler.
"""

from __future__ import annotations

from torch import Tensor

from ldm.models.diffusion.sampling_run import SamplingRun
from ldm.models.diffusion.schedule import Step
from ldm.models.diffusion.solvers.base import ChurningSolver


class Heun(ChurningSolver):
    """Feeds the update rule with the mean of two predictions."""

    name = "heun"

    def _move(self, run: SamplingRun, x: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        eps = run.predict(x, step.t, step.alpha)
        if step.end > 0 and not step.without_signal:
            ahead, _ = run.advance(x, eps, step)
            eps = (eps + run.predict(ahead, self.time(step.end), step.alpha_prev)) / 2
        return run.advance(x, eps, step)
