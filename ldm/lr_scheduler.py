"""The learning-rate schedule that the published configs name."""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

logger = logging.getLogger(__name__)


class LambdaLinearScheduler:
    """Learning-rate multiplier: in each cycle a linear warm-up, then a straight line down.

    Every list has one entry a cycle; lengths count steps. A cycle climbs from `f_start` to `f_max` within
    `warm_up_steps`; then it follows the line that runs from `f_max` at the cycle's start to `f_min` at its end, so it
    steps down a little after the warm-up, as the original's does. After the last cycle the multiplier stays at its
    `f_min`. Use it as `lr_lambda` of `torch.optim.lr_scheduler.LambdaLR`. With `verbosity_interval` above 0 the
    multiplier is logged at every such step.
    """

    def __init__(
        self,
        warm_up_steps: Sequence[int],
        f_min: Sequence[float],
        f_max: Sequence[float],
        f_start: Sequence[float],
        cycle_lengths: Sequence[int],
        verbosity_interval: int = 0,
    ) -> None:
        lengths = {len(values) for values in (warm_up_steps, f_min, f_max, f_start, cycle_lengths)}
        if len(lengths) != 1 or 0 in lengths:
            raise ValueError(f"the lists need one entry a cycle each, but have {sorted(lengths)} entries")
        self.cycles = list(zip(warm_up_steps, f_min, f_max, f_start, cycle_lengths, strict=True))
        self.ends = list(accumulate(cycle_lengths))
        self.verbosity_interval = verbosity_interval

    def schedule(self, n: int) -> float:
        """Returns the multiplier at step `n` (0 is the first)."""
        cycle = min(bisect_right(self.ends, n), len(self.ends) - 1)
        warm_up, f_min, f_max, f_start, length = self.cycles[cycle]
        n_cycle = min(n - (self.ends[cycle] - length), length)
        if n_cycle < warm_up:
            multiplier = f_start + (f_max - f_start) * n_cycle / warm_up
        else:
            multiplier = f_min + (f_max - f_min) * (length - n_cycle) / length
        if self.verbosity_interval > 0 and n % self.verbosity_interval == 0:
            logger.info("step %d: learning-rate multiplier %g, cycle %d", n, multiplier, cycle)
        return multiplier

    __call__ = schedule
