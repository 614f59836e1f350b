"""UniPC (Zhao et al. 2023): a predictor, and a corrector that costs no call of the model.

With h the length of a step in -log sigma, D_0 the clean latent at its start, D_k those of the k steps before, and r_k
where they were, in units of h (r < 0):

    predictor: z_end = e^-h z + (1 - e^-h) D',  D' = D_0 + sum_k a_k (D_k - D_0) / r_k
    corrector: the same with the clean latent found at the end of the step as one more, r = 1

The weights solve sum_k r_k^(i-1) a_k = b_i = i! phi_(i+1)(-h) / B for i = 1, 2, ...; one weight alone is 1/2, of
B_2 = e^-h - 1, or in the form bh1 of B_1 = -h, which is the only difference between the two. The order is lower in
the first steps, and in the last ones, as many as there are steps left. The corrector changes the latent at the start
of the next step. Setting: order, 1 to 3 (2, best with guidance; 3 in the forms of the authors' code, which
AUTOMATIC1111's web UI and ComfyUI have).
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
    first_form = False  # B_1

    def _solve(self, run: SamplingRun) -> TakeStep:
        if self.settings["order"] not in ORDERS:
            raise InputError(f"{self.name} has orders 1 to 3, not {self.settings['order']:g}")
        past: deque[tuple[Tensor, float]] = deque(
            maxlen=int(self.settings["order"])
        )  # clean, start; newest first
        last: list[tuple[Tensor, Tensor, Step, int]] = []  # the step before: where it began, led, what it was

        def take(x: Tensor, step: Step) -> tuple[Tensor, Tensor]:
            clean = clean_latent(x, run.predict(x, step.t, step.alpha), step)
            if last:
                began, led, before, order = last.pop()
                mixed = self._mixed(list(past)[:order], before, (clean, step.start))
                corrected, _ = run.advance(began, implied_noise(began, mixed, before), before)
                x = x + (corrected - led)  # not what a mask has put in place of its part
            past.appendleft((clean, step.start))
            order = min(len(past), step.index + 1)
            mixed = self._mixed(list(past)[:order], step) if step.end > 0 else clean
            ahead, estimate = run.advance(x, implied_noise(x, mixed, step), step)
            last[:] = [(x, ahead, step, order)]
            return ahead, estimate

        return take

    def _mixed(
        self, past: Sequence[tuple[Tensor, float]], step: Step, end: tuple[Tensor, float] | None = None
    ) -> Tensor:
        """Returns D' of a step from the clean latents and levels in `past`, newest first, and that at its `end`."""
        length, (clean, start) = log_length(step), past[0]
        others = [*past[1:], *([] if end is None else [end])]
        places = [math.log(start / level) / length for _, level in others]
        weights = _weights(places, length, self.first_form)
        for (other, _), place, weight in zip(others, places, weights, strict=True):
            clean = clean + weight / place * (other - past[0][0])
        return clean


class UniPCBh1(UniPC):
    """The form with B_1."""

    name = "unipc_bh1"
    first_form = True


class UniPCBh2(UniPC):
    """The form with B_2, of order 3."""

    name = "unipc_bh2"


def _weights(places: Sequence[float], length: float, first_form: bool) -> Sequence[float]:
    """Returns the weights of the clean latents at `places`, in units of a step of this length."""
    whole = math.expm1(-length)
    if len(places) < 2:
        return [0.5 * (-length / whole if first_form else 1.0)] * len(places)
    phi, factorial, right = whole / -length - 1, 1, list[float]()
    for i in range(1, len(places) + 1):
        right.append(phi * factorial / whole)
        factorial *= i + 1
        phi = phi / -length - 1 / factorial
    powers = [[place**i for place in places] for i in range(len(places))]
    return [float(weight) for weight in np.linalg.solve(powers, right)]
