"""Pseudo linear multistep sampling (PNDM, Liu et al. 2022, equations 9, 12 and 13): DDIM with a better noise."""

from __future__ import annotations

from collections import deque

from torch import Tensor

from ldm.models.diffusion.sampler import Sampler, TakeStep, Walk
from ldm.models.diffusion.schedule import Step

# Adams-Bashforth weights by the number of predictions at hand, newest first
WEIGHTS = {
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


class PLMSSampler(Sampler):
    """Feeds the update rule with a mixture of the last four predictions; the first step predicts twice."""

    allows_eta = False

    def _stepper(self, walk: Walk) -> TakeStep:
        past: deque[Tensor] = deque(maxlen=4)

        def take(x: Tensor, step: Step, next_t: float) -> tuple[Tensor, Tensor]:
            eps = walk.predict(x, step.t)
            past.appendleft(eps)
            if len(past) == 1:  # Heun's method: average with the prediction at the far end of the step
                ahead, _ = walk.advance(x, eps, step)
                mixed = (eps + walk.predict(ahead, next_t)) / 2
            else:
                mixed = sum((w * e for w, e in zip(WEIGHTS[len(past)], past, strict=True)), 0 * eps)
            return walk.advance(x, mixed, step)

        return take
