"""UniPC (Zhao et al. 2023, B_2(h) = e^h - 1): a predictor, and a corrector that costs no call of the model.

With h the length of a step in -log sigma, D_0 the clean latent at its start, D_k those of the k steps before, and r_k
where they were, in units of h (r < 0):

    predictor: z_end = e^-h z + (1 - e^-h) D',  D' = D_0 + sum_k a_k (D_k - D_0) / r_k
    corrector: the same with the clean latent found at the end of the step as one more, r = 1

The weights solve sum_k r_k^(i-1) a_k = b_i = i! phi_(i+1)(-h) / B for i = 1, 2, ...; one weight alone is 1/2. The
order is lower in the first steps, and in the last ones, as many as there are steps left. The corrector changes the
latent at the start of the next step. Setting: order, 1 to 3 (2, best with guidance).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from ldm.models.diffusion.sampler import TakeStep
from ldm.models.diffusion.sampling_run import SamplingRun, clean_latent, implied_noise
from ldm.models.diffusion.schedule import Step
from ldm.models.diffusion.solvers.base import Solver, log_length
from ldm.util import InputError

ORDERS = (1, 2, 3)


class UniPC(Solver):
    """Feeds the update rule with the noise that a mixture of clean latents implies, and corrects the step before."""

    name = "unipc"

    def _solve(self, run: SamplingRun) -> TakeStep:
        if self.settings["order"] not in ORDERS:
            raise InputError(f"unipc has orders 1 to 3, not {self.settings['order']:g}")
        past: deque[tuple[Tensor, float]] = deque(
            maxlen=int(self.settings["order"])
        )  # clean, start; newest first
        last: list[tuple[Tensor, Tensor, Step, int]] = []  # the step before: where it began, led, what it was

        def take(x: Tensor, step: Step) -> tuple[Tensor, Tensor]:
            clean = clean_latent(x, run.predict(x, step.t, step.alpha), step)
            if last:
                began, led, before, order = last.pop()
                mixed = _mixed(list(past)[:order], before, (clean, step.start))
                corrected, _ = run.advance(began, implied_noise(began, mixed, before), before)
                x = x + (corrected - led)  # not what a mask has put in place of its part
            past.appendleft((clean, step.start))
            order = min(len(past), step.index + 1)
            mixed = _mixed(list(past)[:order], step) if step.end > 0 else clean
            ahead, estimate = run.advance(x, implied_noise(x, mixed, step), step)
            last[:] = [(x, ahead, step, order)]
            return ahead, estimate

        return take


def _mixed(
    past: Sequence[tuple[Tensor, float]], step: Step, end: tuple[Tensor, float] | None = None
) -> Tensor:
    """Returns D' of a step from the clean latents and levels in `past`, newest first, and that at its `end`."""
    length, (clean, start) = log_length(step), past[0]
    others = [*past[1:], *([] if end is None else [end])]
    places = [math.log(start / level) / length for _, level in others]
    for (other, _), place, weight in zip(others, places, _weights(places, length), strict=True):
        clean = clean + weight / place * (other - past[0][0])
    return clean


def _weights(places: Sequence[float], length: float) -> Sequence[float]:
    """Returns the weights of the clean latents at `places`, in units of a step of this length."""
    if len(places) < 2:
        return [0.5] * len(places)
    whole = math.expm1(-length)
    phi, factorial, right = whole / -length - 1, 1, list[float]()
    for i in range(1, len(places) + 1):
        right.append(phi * factorial / whole)
        factorial *= i + 1
        phi = phi / -length - 1 / factorial
    powers = [[place**i for place in places] for i in range(len(places))]
    return [float(weight) for weight in np.linalg.solve(powers, right)]
