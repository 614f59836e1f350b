"""Noise schedules: which levels of noise the steps of a sampler visit.

Names and choices only, so that options and metadata can read them without numpy; the formulas are in
`schedules/rules.py`. A level is written sigma as in k-diffusion: a noisy latent divided by its signal is
x_0 + sigma eps, so sigma = sqrt((1 - alpha) / alpha) with alpha as in `schedule.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from ldm.models.diffusion.schedules.levels import Array, Levels


@dataclass(frozen=True)
class ScheduleRow:
    """A schedule: its name, the function of `schedules/rules.py`, and a line for people.

    `rho` is its default exponent, if it has one. `max_denoise`: its steps start from noise as it is (see `Schedule`).
    """

    name: str
    rule: str
    about: str
    rho: float | None = None
    max_denoise: bool = False


_ROWS = (
    ScheduleRow(
        "original", "original", "the original's timesteps, which end at timestep 0", max_denoise=True
    ),
    ScheduleRow("uniform", "uniform", "even steps in time from the last timestep to the first, then 0"),
    ScheduleRow("karras", "karras", "even steps in sigma^(1/rho) (Karras et al. 2022)", rho=7.0),
    ScheduleRow("exponential", "exponential", "even steps in log sigma"),
    ScheduleRow("polyexponential", "polyexponential", "a power of even steps in log sigma", rho=1.0),
    ScheduleRow("sgm_uniform", "sgm_uniform", "uniform with one point more, of which the last is left out"),
    ScheduleRow(
        "time_uniform",
        "time_uniform",
        "even steps in time from the last timestep to the first, which end there",
        max_denoise=True,
    ),
    ScheduleRow("simple", "simple", "every (total / steps)-th trained level from the last one down"),
    ScheduleRow("normal", "uniform", "ComfyUI's name of uniform"),
    ScheduleRow("ddim_uniform", "ddim_uniform", "every (total // steps)-th trained level from timestep 1 up"),
    ScheduleRow(
        "beta", "beta", "timesteps at quantiles of a beta distribution (Lee et al. 2024), as ComfyUI"
    ),
    ScheduleRow("beta_a1111", "beta_a1111", "sigmas at quantiles of a beta distribution, as A1111's web UI"),
    ScheduleRow("kl_optimal", "kl_optimal", "even steps in arctan sigma, then 0, as ComfyUI"),
    ScheduleRow("kl_optimal_a1111", "kl_optimal_a1111", "even steps in arctan sigma, as A1111's web UI"),
    ScheduleRow("align_your_steps", "align_your_steps", "a tuned table (Sabour et al. 2024), as ComfyUI"),
    ScheduleRow("align_your_steps_a1111", "align_your_steps_a1111", "the tuned table, as A1111's web UI"),
    ScheduleRow(
        "trailing", "trailing", "every (total / steps)-th timestep down from the last", max_denoise=True
    ),
    ScheduleRow("lcm", "lcm", "a part of the 50 timesteps of a latent consistency model", max_denoise=True),
    ScheduleRow("tcd", "tcd", "the timesteps of lcm, which end at timestep 0", max_denoise=True),
    ScheduleRow("sigmas", "sigmas", "a list of sigmas"),
    ScheduleRow("timesteps", "timesteps", "a list of timesteps, then sigma 0"),
)

SCHEDULES: dict[str, ScheduleRow] = {row.name: row for row in _ROWS}
LISTS = ("sigmas", "timesteps")  # the schedules of which `values` are the levels


@dataclass(frozen=True)
class Schedule:
    """A schedule by name, and the choices in which programs differ that call it by this name.

    `rho` is the exponent of karras and polyexponential; `sigma_min` and `sigma_max` bound the schedules that are
    formulas in sigma (None: the model's). `rounded`: the model is called at whole timesteps (ComfyUI), not at
    fractional ones (k-diffusion). `discard_next_to_last`: one level more is computed and the next to last left out
    (A1111 and ComfyUI for DPM2 and others). `max_denoise`: the first latents are noise * sqrt(1 + sigma^2), not
    noise * sigma (None: as the schedule's author). `spacing` is that of the original's timesteps, `values` the levels
    of "sigmas", which should end in 0, and "timesteps", both descending. `share` is the part of their trained
    timesteps, from the first, that the steps of lcm and tcd are spread over: the strength of a run from an image.
    """

    name: str = "original"
    rho: float | None = None
    sigma_min: float | None = None
    sigma_max: float | None = None
    rounded: bool = False
    discard_next_to_last: bool = False
    max_denoise: bool | None = None
    spacing: Literal["uniform", "compvis", "quad"] = "uniform"
    values: tuple[float, ...] = ()
    share: float = 1.0

    @property
    def row(self) -> ScheduleRow:
        """Returns the row of a schedule. Raises `InputError` for an unknown name."""
        from ldm.util import InputError

        if self.name not in SCHEDULES:
            raise InputError(f"unknown schedule {self.name!r}; it is one of {', '.join(SCHEDULES)}")
        return SCHEDULES[self.name]

    @property
    def from_plain_noise(self) -> bool:
        """Whether the first latents are standard normal noise as it is, in sigma noise * sqrt(1 + sigma^2)."""
        return self.row.max_denoise if self.max_denoise is None else self.max_denoise

    def levels(self, steps: int, alphas_cumprod: Array) -> Levels:
        """Returns the levels of `steps` steps for a model's table of alphas [T].

        A few schedules have another number of steps than asked for: beta without duplicates, ddim_uniform and lists.
        Raises `InputError` if the schedule cannot have that many.
        """
        from ldm.models.diffusion.schedules.levels import levels_of

        return levels_of(self, steps, alphas_cumprod)

    def length(self, steps: int, total: int = 1000) -> int:
        """Returns how many steps there are if `steps` are asked for, with a model of `total` timesteps.

        Raises `InputError` as `levels` does.
        """
        from ldm.models.diffusion.schedules.levels import example_alphas

        return len(self.levels(steps, example_alphas(total)).timesteps)
