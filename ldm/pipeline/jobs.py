"""Jobs before they are made: checked, and numbered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ldm.job import Job
from ldm.job_values import check_fields
from ldm.models.diffusion.control import check_control
from ldm.models.diffusion.course import check_guidance
from ldm.models.diffusion.ddpm import LatentDiffusion, LatentEditDiffusion
from ldm.models.diffusion.passes import begun_from_noise, begun_without_signal, check_sampling
from ldm.seeds import counted
from ldm.util import InputError


def suited(job: Job, model: LatentDiffusion) -> Job:
    """A job as its model needs it: on a schedule that begins without signal, and from noise if it edits images."""
    job = begun_without_signal(job) if model.zero_terminal_snr else job
    return begun_from_noise(job) if isinstance(model, LatentEditDiffusion) else job


def check_job(job: Job, image_size: tuple[int, int] | None, factor: int, model: LatentDiffusion) -> None:
    """Raises `InputError` for a job that cannot be made; its image, if it has one, has this height and width.

    `factor` is how many pixels a latent value of `model` spans.
    """
    if image_size is not None and (job.height, job.width) != image_size:
        height, width = image_size
        raise InputError(
            f"the size is {job.width}x{job.height}, but the image to start from becomes {width}x{height}; "
            "leave width and height of the job out, or give those of its Init with resize"
        )
    check_fields(job)
    check_sampling(job)
    check_guidance(job, isinstance(model, LatentEditDiffusion))
    check_control(job)
    if job.height % factor or job.width % factor:
        raise InputError(f"{job.width}x{job.height} is not a multiple of {factor} pixels")


def numbered(jobs: Sequence[Job]) -> list[Job]:
    """The jobs of one call as images 0, 1, ...: with seeds that count up, or as entries of one stream of noise."""
    if jobs and jobs[0].seed_mode == "image":
        return [counted(job, i) for i, job in enumerate(jobs)]
    return [replace(job, batch_index=i) for i, job in enumerate(jobs)]
