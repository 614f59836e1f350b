"""How much guidance each step of a run has: an interval, and a curve of the scale."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ldm.job import Job
from ldm.util import InputError

# The factor of the guidance (scale - 1) at a share of the steps, 0 to 1; its mean over them is 1. The first four are
# linear, cosine, invlinear and sine of Wang et al. 2024 (arXiv 2404.13040), where time runs the other way.
CURVES: Mapping[str, Callable[[float], float]] = {
    "linear": lambda share: 2 * share,
    "cosine": lambda share: 1 - math.cos(math.pi * share),
    "linear_down": lambda share: 2 * (1 - share),
    "cosine_down": lambda share: 1 + math.cos(math.pi * share),
    "peak": lambda share: 2 - 4 * abs(share - 0.5),
    "valley": lambda share: 4 * abs(share - 0.5),
}


@dataclass(frozen=True, slots=True)
class Moment:
    """Where a step is: `step` steps of its run were before it, `row` of the `rows` of the whole schedule.

    The two differ where a run begins in the middle of the schedule, as from an image. The step begins at the noise
    level `alpha`.
    """

    step: int
    row: int
    rows: int
    alpha: float

    @property
    def steps(self) -> int:
        """How many steps the run has, this one included."""
        return self.step + self.rows - self.row

    @property
    def share(self) -> float:
        """The share of the schedule's steps before this one, from 0 to below 1."""
        return self.row / self.rows

    @property
    def middle(self) -> float:
        """The share of the schedule's steps at the middle of this one."""
        return (self.row + 0.5) / self.rows

    @property
    def sigma(self) -> float:
        """The noise over the signal where the step begins."""
        return ((1 - self.alpha) / self.alpha) ** 0.5


@dataclass(frozen=True)
class Course:
    """The share of its guidance that a step has.

    There is none outside of `interval`, lowest and highest: shares of the steps of the whole schedule, or with
    `in_sigma` noise over signal (Kynkäänniemi et al. 2024, arXiv 2404.07724). Inside it follows a `curve` of
    `CURVES`, or is "constant".
    """

    interval: tuple[float, float] = (0.0, 1.0)
    in_sigma: bool = False
    curve: str = "constant"

    @classmethod
    def of(cls, job: Job) -> Course:
        """The course of a job's guidance."""
        return cls(job.guidance_interval, job.guidance_interval_in == "sigma", job.guidance_schedule)

    def factor(self, moment: Moment) -> float:
        """Returns the factor of the guidance (scale - 1) at a step: 0 is none, 1 all of it."""
        low, high = self.interval
        inside = low < moment.sigma <= high if self.in_sigma else low <= moment.share < high
        if not inside:
            return 0.0
        return 1.0 if self.curve == "constant" else CURVES[self.curve](moment.middle)


CONSTANT = Course()


def check_guidance(job: Job, edits: bool = False) -> None:
    """Raises `InputError` if the ends of a job's guidance interval are in the wrong order, or no shares of steps.

    Without `edits` the model is none that edits images, and a scale for them is refused.
    """
    if job.image_scale != Job("").image_scale and not edits:
        raise InputError(
            f"--image_scale {job.image_scale:g} is for models that edit images (InstructPix2Pix), and this one does "
            "not; leave it out, or give one with --ckpt"
        )
    low, high = job.guidance_interval
    shown = f"--guidance_interval is {low:g},{high:g}"
    if low > high:
        raise InputError(f"{shown}, whose first value is the higher one; give {high:g},{low:g}")
    if high > 1 and job.guidance_interval_in == "steps":
        raise InputError(
            f"{shown}, but shares of the steps are 0 to 1; for noise levels add --guidance_interval_in sigma"
        )
