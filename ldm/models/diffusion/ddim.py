"""DDIM (Song et al. 2021): one prediction a step."""

from __future__ import annotations

from torch import Tensor

from ldm.models.diffusion.sampler import Sampler, TakeStep, Walk
from ldm.models.diffusion.schedule import Step


class DDIMSampler(Sampler):
    """Feeds the update rule with the noise predicted at each step; `eta` between 0 (none) and 1 adds noise."""

    def _stepper(self, walk: Walk) -> TakeStep:
        def take(x: Tensor, step: Step, next_t: float) -> tuple[Tensor, Tensor]:
            return walk.advance(x, walk.predict(x, step.t), step)

        return take
