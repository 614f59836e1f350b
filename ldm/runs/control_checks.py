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
    from ldm.checkpoints.image_encoder import encoder_folder
    from ldm.images.canvas import open_canvas
    from ldm.images.hints import read_hint
    from ldm.images.source import read_image

    for file, image, *_ in job.controls:
        if read_control(control_file(file)).is_image_prompt:
            encoder_folder(control_file(file))
            read_image(image)
            continue
        read_hint(job, image, (job.height, job.width), partial(open_canvas, own_side=side))
