"""Jobs before they are made: checked, and numbered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ldm.job import Job
from ldm.job_values import check_fields
from ldm.models.diffusion.control import check_control
from ldm.models.diffusion.course import check_guidance
from ldm.models.diffusion.passes import check_sampling
from ldm.seeds import counted
from ldm.util import InputError


def check_job(job: Job, image_size: tuple[int, int] | None, factor: int, edits: bool) -> None:
    """Raises `InputError` for a job that cannot be made; its image, if it has one, has this height and width.

    `factor` is how many pixels a latent value spans; the model may be one that `edits` images.
    """
    if image_size is not None and (job.height, job.width) != image_size:
        height, width = image_size
        raise InputError(
            f"the size is {job.width}x{job.height}, but the image to start from becomes {width}x{height}; "
            "leave width and height of the job out, or give those of its Init with resize"
        )
    check_fields(job)
    check_sampling(job)
    check_guidance(job, edits)
    check_control(job)
    if job.height % factor or job.width % factor:
        raise InputError(f"{job.width}x{job.height} is not a multiple of {factor} pixels")


def numbered(jobs: Sequence[Job]) -> list[Job]:
    """The jobs of one call as images 0, 1, ...: with seeds that count up, or as entries of one stream of noise."""
    if jobs and jobs[0].seed_mode == "image":
        return [counted(job, i) for i, job in enumerate(jobs)]
    return [replace(job, batch_index=i) for i, job in enumerate(jobs)]
