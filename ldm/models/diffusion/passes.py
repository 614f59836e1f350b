"""A job's solver, schedule and passes: which steps it runs, at which size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from ldm.job import Job
from ldm.models.diffusion.schedules import Schedule
from ldm.models.diffusion.solvers.registry import JOB_SETTINGS, SOLVERS
from ldm.util import InputError


@dataclass(frozen=True)
class Convention:
    """Details in which programs differ that run the same solver on the same schedule.

    `rounded`: the model is called at whole timesteps. `shortened` are the solvers whose schedule has one level more,
    of which the next to last is left out. `max_denoise`: the first latents are noise * sqrt(1 + sigma^2), not
    noise * sigma (None: as the author of the schedule has it). `one_more`: at a strength below 1, one step more than
    the share that is asked for runs, from the level at which it begins. For the solvers in `brownian` the noise of
    steps is a Brownian path, over the levels of the schedule or, with `path_over_run`, of the run.
    """

    rounded: bool = False
    shortened: tuple[str, ...] = ()
    max_denoise: bool | None = None
    one_more: bool = False
    brownian: tuple[str, ...] = ()
    path_over_run: bool = False


_TREES = (
    "dpmpp_sde",
    "dpmpp_2m_sde",
    "dpmpp_2m_sde_heun",
    "dpmpp_3m_sde",
)  # with k-diffusion's noise sampler
CONVENTIONS: Mapping[str, Convention] = {
    "ldm": Convention(),
    "a1111": Convention(shortened=("dpm2", "dpm2_a", "dpmpp_3m_sde"), one_more=True, brownian=_TREES),
    "comfyui": Convention(
        rounded=True,
        shortened=("dpm2", "dpm2_a", "unipc_bh1", "unipc_bh2"),
        max_denoise=True,
        brownian=_TREES,
        path_over_run=True,
    ),
}


def schedule_of(job: Job, share: float = 1.0) -> Schedule:
    """Returns the schedule of a job: its own levels, the one that it names, or the solver's, for a `share` of it."""
    convention = CONVENTIONS[job.convention]
    ends = job.sigmas and job.sigmas[-1] > 0  # then the last step removes the rest of the noise
    given = (*job.sigmas, 0.0) if ends else job.sigmas or job.timesteps
    name = "sigmas" if job.sigmas else "timesteps" if job.timesteps else job.schedule
    return Schedule(
        SOLVERS[job.sampler].schedule if name == "auto" else name,
        rounded=convention.rounded,
        discard_next_to_last=job.sampler in convention.shortened and not given,
        max_denoise=convention.max_denoise,
        spacing=job.timestep_spacing,
        values=given,
        share=share,
    )


def begun_without_signal(job: Job) -> Job:
    """Returns a job for a model with zero terminal SNR: on the schedule trailing, if its own would begin later.

    Such a model was trained without signal at the last timestep, where the original's timesteps do not begin (Lin et
    al. 2024, section 3.3). A schedule, spacing or levels that the job chooses are kept.
    """
    own = job.schedule == "auto" and job.timestep_spacing == "uniform" and not (job.sigmas or job.timesteps)
    begins_later = SOLVERS[job.sampler].schedule == "original" and job.sampler != "dpm_solver"
    return replace(job, schedule="trailing") if own and begins_later else job


def begun_from_noise(job: Job) -> Job:
    """Returns a job for a model that edits images: it sees the image at each step, and starts from noise."""
    return job if job.init is None else replace(job, strength=1.0)


def settings_of(job: Job) -> dict[str, float]:
    """Returns the settings of a job's solver that differ from the solver's defaults."""
    asked = {name: getattr(job, name) for name in JOB_SETTINGS} | {"eta": eta_of(job)}
    return {name: value for name, value in asked.items() if value != SOLVERS[job.sampler].default(name)}


def eta_of(job: Job) -> float:
    """Returns the share of fresh noise in a job's steps: its own, or the solver's usual one."""
    return SOLVERS[job.sampler].default("eta") if job.eta is None else job.eta


def follows_path(job: Job) -> bool:
    """Returns whether the fresh noise of a job's steps is a Brownian path."""
    if job.step_noise == "auto":
        return job.seed_mode == "image" and job.sampler in CONVENTIONS[job.convention].brownian
    return job.step_noise == "brownian"


def check_sampling(job: Job) -> None:
    """Raises `InputError` if a job's solver cannot run with its settings, schedule or number of steps."""
    row, schedule = SOLVERS[job.sampler], schedule_of(job)
    for name, value in settings_of(job).items():
        if name not in row.settings:
            others = ", ".join(other for other, one in SOLVERS.items() if name in one.settings)
            raise InputError(
                f"{job.sampler} does not use --{JOB_SETTINGS[name].option}, here {value:g}; leave it out, or use one "
                f"of the samplers that do: {others}"
            )
    _check_step_noise(job)
    if job.sigmas and job.timesteps:
        raise InputError("--sigmas and --timesteps contradict; leave one of them out")
    if job.timestep_spacing != "uniform" and (job.sampler == "dpm_solver" or schedule.name != "original"):
        raise InputError(
            f"--timestep_spacing {job.timestep_spacing} goes with ddim and plms on their own schedule, not with "
            f"{job.sampler} on {schedule.name}; leave it out"
        )
    if job.cache_steps and (min(job.cache_steps) < 0 or job.cache_steps[0] == 0):
        given = ",".join(map(str, job.cache_steps))
        raise InputError(
            f"--cache_steps is {given}; give the interval, 1 or more, then the branch and the centre, 0 or more"
        )
    schedule_length(job)
    for one in passes_of(job):
        schedule_of(job, one.share).length(job.steps)


def _check_step_noise(job: Job) -> None:
    row, on_path = SOLVERS[job.sampler], job.step_noise == "brownian"
    if on_path and (row.rises or not (row.always_draws or "eta" in row.settings)):
        raise InputError(
            f"--step_noise brownian goes with samplers that add noise in their steps, not with {job.sampler}; use "
            "dpmpp_2m_sde, or leave it out"
        )
    if job.seed_mode == "batch" and (on_path or job.step_rng != "auto" or job.step_seed_delta):
        option = "step_noise" if on_path else "step_rng" if job.step_rng != "auto" else "step_seed_delta"
        raise InputError(
            f"--{option} {getattr(job, option)} gives the steps of each image noise of their own, but with "
            "--seed_mode batch all images share one stream; leave one of them out"
        )


def schedule_length(job: Job) -> int:
    """Returns the number of steps in a job's schedule: not `job.steps` with `compvis` spacing and a few others."""
    schedule = schedule_of(job)
    if job.sampler == "dpm_solver" and schedule.name == "original":
        return job.steps
    return schedule.length(job.steps)


def steps_to_run(strength: float, steps: int, rows: int, one_more: bool = False) -> int:
    """Returns how many of a table's `rows` steps run at a strength in [0, 1], where `steps` were requested.

    int(strength * steps), as in the original; at strength 1 all of them. With `one_more`, as in A1111's web UI, one
    step more, unless that would be all.
    """
    if strength == 1:
        return rows
    count = int(strength * steps)
    return min(min(count, steps - 1) + 1 if one_more else count, rows)


@dataclass(frozen=True, slots=True)
class Pass:
    """One run of a sampler for a job: at `size`, height and width in pixels, the last `steps` of its schedule.

    It starts from noise, from latents that are noised first, or from the upscaled latents of the previous pass.
    `share` is that of its schedule.
    """

    size: tuple[int, int]
    steps: int
    start: Literal["noise", "latents", "upscaled"]
    share: float = 1.0

    def model_calls(self, sampler: str) -> int:
        """Returns how often the model is called for each image, both halves of a guided call counting as one."""
        return SOLVERS[sampler].model_calls(self.steps) if self.steps else 0


def passes_of(job: Job, rows: int | None = None, from_noise: bool | None = None) -> list[Pass]:
    """Returns the passes of a job whose schedule has `rows` steps: one, or with `upscale` a second one.

    The first starts from noise if the job has no start image, unless `from_noise` is given.
    """
    rows = schedule_length(job) if rows is None else rows
    size, from_noise = (job.height, job.width), job.init is None if from_noise is None else from_noise
    first = Pass(size, rows, "noise") if from_noise else _pass_at(job, job.strength, size, rows, "latents")
    if job.upscale <= 1:
        return [first]
    return [first, _pass_at(job, job.upscale_strength, job.upscaled_size, rows, "upscaled")]


def _pass_at(
    job: Job, strength: float, size: tuple[int, int], rows: int, start: Literal["latents", "upscaled"]
) -> Pass:
    """Returns the pass of a job at a strength, whose schedule has `rows` steps."""
    name = schedule_of(job).name
    if name in ("lcm", "tcd") and job.convention == "ldm" and 0 < strength < 1:
        return Pass(size, rows, start, strength)
    # the original's schedule keeps its rule
    one_more = CONVENTIONS[job.convention].one_more and name != "original"
    return Pass(size, steps_to_run(strength, job.steps, rows, one_more), start)
