"""Estimates the time of a plan, from the work of its networks and the pace of the machine."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ldm.job import Job, batch_key
from ldm.runs.added_costs import Cost, control_costs
from ldm.runs.options import RunOptions
from ldm.runs.plan import Plan
from ldm.runs.processes import asked_for

if TYPE_CHECKING:
    import torch

    from ldm.runtime.device import Precision
    from ldm.runtime.estimate import NetworkWork, Pace


@dataclass(frozen=True)
class Batch:
    """A kind of batch: what its jobs share, their number, whether any is guided, and the most parts of a prompt.

    `sees` is whether the guidance has a prediction more, that with the image to edit but without the prompt.
    """

    job: Job
    images: int
    guided: bool
    parts: int = 1
    sees: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the first pass."""
        return self.job.height, self.job.width

    @property
    def samples(self) -> int:
        """The number of samples in a call of the U-Net."""
        return self.images * (self.parts + (1 if self.guided else 0) + (1 if self.sees else 0))

    @property
    def encodes_again(self) -> bool:
        """Whether the images pass through the autoencoder between the passes."""
        return self.job.upscale > 1 and self.job.upscale_in == "pixels"

    def passes(self) -> list[tuple[tuple[int, int], int, float]]:
        """Returns height and width, the number of calls of the model, and that of the guided ones, of each pass."""
        from ldm.models.diffusion.passes import passes_of

        found = [(one, one.model_calls(self.job.sampler)) for one in passes_of(self.job)]
        return [(one.size, calls, calls * self._guided_share(one.steps)) for one, calls in found]

    def full_shares(self) -> list[float]:
        """Returns the share of the steps of each pass that run the whole U-Net, see `Job.cache_steps`."""
        from ldm.models.diffusion.passes import passes_of
        from ldm.runtime.shortcuts import full_steps

        interval, _, *centre = (*self.job.cache_steps, *(1, 0)[len(self.job.cache_steps) :])
        counts = [one.steps for one in passes_of(self.job)]
        return [len(full_steps(steps, interval, *centre)) / max(steps, 1) for steps in counts]

    def _guided_share(self, steps: int) -> float:
        """Returns the share of the last steps that can be guided: all, or the ones in an interval of steps."""
        from ldm.models.diffusion.passes import schedule_length

        if not self.guided or self.job.guidance_interval_in == "sigma" or steps == 0:
            return float(self.guided)
        rows, (low, high) = schedule_length(self.job), self.job.guidance_interval
        return sum(low <= row / rows < high for row in range(rows - steps, rows)) / steps


def batch_kinds(
    plan: Plan, missing: Sequence[Sequence[int]] | None = None, embedded: bool = False, edits: bool = False
) -> Counter[Batch]:
    """Counts the batches of each kind in a run, or in its `missing` ones.

    With `embedded` the guidance scale is an input of the U-Net, which then runs on the prompt alone. With `edits` the
    model sees an image that it edits.
    """
    return Counter(
        _kind([plan[i] for i in batch], embedded, edits)
        for batch in (plan.batches() if missing is None else missing)
    )


def _kind(jobs: Sequence[Job], embedded: bool, edits: bool) -> Batch:
    from ldm.prompts.editing import Script

    scripts = [Script.of(job) for job in jobs]
    guided = any(job.scale != 1 or s.is_composed for job, s in zip(jobs, scripts, strict=True))
    sees = edits and jobs[0].init is not None and jobs[0].image_scale != 1
    guided = (guided or sees) and not embedded
    return Batch(batch_key(jobs[0]), len(jobs), guided, max(len(script.parts) for script in scripts), sees)


def count_texts(plan: Plan) -> int:
    """Counts the different texts of a run, those of negative prompts included."""
    from ldm.prompts.editing import scripts_of

    return len(
        {
            (text, job.loras)
            for job in plan.kinds()
            for script in scripts_of(job)
            for part in (*script.parts, *([script.negative] if job.scale != 1 or script.is_composed else []))
            for _, text in part.texts
        }
    )


def run_seconds(
    batches: Mapping[Batch, int],
    texts: int,
    work: NetworkWork,
    pace: Callable[[Precision], Pace],
    precision: Precision,
) -> float:
    """Returns the seconds that one device takes for all batches in `precision`, without loading and writing.

    `pace` returns that of a precision: images are encoded in float32.
    """
    inits = {(batch.job.init, batch.size) for batch in batches if batch.job.init is not None}
    controls = control_costs((batch.job for batch in batches), work, precision)
    return (
        texts * pace(precision.beside).seconds(work.read)
        + sum(_encode_seconds(size, work, pace) for _, size in inits)
        + sum(
            times * _batch_seconds(batch, work, pace, precision, controls) for batch, times in batches.items()
        )
    )


def _batch_seconds(
    batch: Batch,
    work: NetworkWork,
    pace: Callable[[Precision], Pace],
    precision: Precision,
    controls: Mapping[str, Cost],
) -> float:
    own, beside, last = pace(precision), pace(precision.beside), batch.job.upscaled_size
    branch = (*batch.job.cache_steps, 0, 0)[1]

    def call(size: tuple[int, int], samples: int, full: float) -> float:
        whole = own.seconds(work.predict(*size), samples)
        return (
            whole
            if full == 1
            else full * whole + (1 - full) * own.seconds(work.reuse(branch, *size), samples)
        )

    denoising = sum(
        guided * call(size, batch.samples, full)
        + (calls - guided) * call(size, batch.images * batch.parts, full)
        for (size, calls, guided), full in zip(batch.passes(), batch.full_shares(), strict=True)
    )
    if networks := sum(controls[file].runs_each_step for file, *_ in batch.job.controls):
        denoising += networks * sum(
            calls * beside.seconds(work.control(*size), batch.samples) for size, calls, _ in batch.passes()
        )
    each = beside.seconds(work.decode(*last))
    if batch.encodes_again:
        each += beside.seconds(work.decode(*batch.size)) + _encode_seconds(last, work, pace)
    return denoising + batch.images * each


def _encode_seconds(size: tuple[int, int], work: NetworkWork, pace: Callable[[Precision], Pace]) -> float:
    from ldm.runtime.device import FULL

    return pace(FULL).seconds(work.encode(*size))


def parallel(options: RunOptions, device: torch.device, batches: int) -> int:
    """Returns how many batches run at the same time. Processes on the CPU of one machine share its cores."""
    import torch

    devices, nodes = asked_for(options)
    if device.type == "cpu":
        devices = min(devices, max((os.cpu_count() or 1) // torch.get_num_threads(), 1))
    return max(min(devices * nodes, batches), 1)
