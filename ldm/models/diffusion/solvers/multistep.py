"""Linear multistep methods: a mixture of the last predictions, with weights that sum to 1.

The prediction is approximated by a polynomial through the last ones and integrated over the step:

    z_end = z + sum_k eps_k integral of L_k d sigma from start to end
    L_k = product over the other j of (u - u_j) / (u_k - u_j)

lms: u = sigma (k-diffusion), order 4. deis: u = log sigma (DEIS, Zhang and Chen 2023, "log rho"), order 2; a step to
sigma 0 has order 1, and with few steps the last ones have no more than there are steps left. ipndm: the weights of
PLMS, those of equal steps (iPNDM, Zhang and Chen 2023), without its Heun step at the start. Setting: order, 1 to 4.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from ldm.models.diffusion.dpm_solver.sampler import FEW_STEPS
from ldm.models.diffusion.plms import WEIGHTS
from ldm.models.diffusion.sampler import TakeStep
from ldm.models.diffusion.sampling_run import SamplingRun
from ldm.models.diffusion.schedule import Step
from ldm.models.diffusion.solvers.base import Solver
from ldm.util import InputError

NODES, NODE_WEIGHTS = np.polynomial.legendre.leggauss(16)  # exact for a polynomial of degree 31


class MultistepSolver(Solver):
    """Feeds the update rule with a mixture of the last predictions; a subclass chooses the weights."""

    def _solve(self, run: SamplingRun) -> TakeStep:
        order = int(self.settings["order"])
        if not 1 <= order <= max(WEIGHTS):
            raise InputError(f"{self.name} has orders 1 to {max(WEIGHTS)}, not {self.settings['order']:g}")
        past: deque[tuple[float, Tensor]] = deque(maxlen=order)  # newest first

        def take(x: Tensor, step: Step) -> tuple[Tensor, Tensor]:
            past.appendleft((step.start, run.predict(x, step.t, step.alpha)))
            used = list(past)[: self._highest_order(step)]
            weights = self._weights([start for start, _ in used], step) if len(used) > 1 else [1.0]
            mixed = sum((w * eps for w, (_, eps) in zip(weights, used, strict=True)), 0 * used[0][1])
            return run.advance(x, mixed, step)

        return take

    def _highest_order(self, step: Step) -> int:
        """Returns the order that a step may have at most."""
        return max(WEIGHTS)

    def _weights(self, levels: Sequence[float], step: Step) -> Sequence[float]:
        """Returns the weights of the predictions at `levels`, newest first, for the step."""
        raise TypeError(f"{type(self).__name__} does not define _weights")


class LMS(MultistepSolver):
    """A polynomial in sigma."""

    name = "lms"

    def _weights(self, levels: Sequence[float], step: Step) -> Sequence[float]:
        sigmas = (step.start + step.end) / 2 + (step.end - step.start) / 2 * NODES
        return [float(values @ NODE_WEIGHTS) / 2 for values in _basis(sigmas, levels)]


class DEIS(MultistepSolver):
    """A polynomial in log sigma."""

    name = "deis"

    def _highest_order(self, step: Step) -> int:
        if step.end == 0:
            return 1
        return step.index + 1 if len(self.table) < FEW_STEPS else max(WEIGHTS)

    def _weights(self, levels: Sequence[float], step: Step) -> Sequence[float]:
        length = math.log(step.end / step.start)
        logs = math.log(step.start) + length / 2 * (1 + NODES)
        # d sigma = sigma d log sigma
        density = np.exp(logs) * NODE_WEIGHTS * length / 2 / (step.end - step.start)
        return [float(values @ density) for values in _basis(logs, [math.log(level) for level in levels])]


class IPNDM(MultistepSolver):
    """The weights of equal steps."""

    name = "ipndm"

    def _weights(self, levels: Sequence[float], step: Step) -> Sequence[float]:
        return WEIGHTS[len(levels)]


def _basis(points: np.ndarray, nodes: Sequence[float]) -> list[np.ndarray]:
    """Returns the Lagrange polynomials of `nodes`, each at `points` [n]."""
    return [
        np.prod([(points - other) / (node - other) for other in nodes if other != node], axis=0)
        for node in nodes
    ]
