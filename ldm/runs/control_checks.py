"""Checks of the files that control a job, before weights are loaded."""

from __future__ import annotations

from functools import partial

from ldm.job import Job


def check_control_files(job: Job, side: int) -> None:
    """Checks the files of a job's control networks, but for their weights, and its hints; else raises InputError.

    `side` is that of the images that the model was trained with.
    """
    if not job.controls:
        return
    from ldm.checkpoints.adapters.control import control_file, read_control
    from ldm.images.canvas import open_canvas
    from ldm.images.hints import read_hint

    for file, image, *_ in job.controls:
        read_control(control_file(file))
        read_hint(job, image, (job.height, job.width), partial(open_canvas, own_side=side))
