"""Checks of the files that control a job, before weights are loaded."""

from __future__ import annotations

import re
from functools import partial

from ldm.job import MODEL_ENDINGS, Job
from ldm.places import find
from ldm.util import InputError, printable

_NUMBER = re.compile(r"[-+]?[0-9.]+")


def check_control_files(job: Job, side: int) -> None:
    """Checks the files of a job's control networks, but for their weights, and its hints; else raises InputError.

    `side` is that of the images that the model was trained with.
    """
    if not job.controls:
        return
    from ldm.checkpoints.adapters.control import control_file, read_control
    from ldm.checkpoints.adapters.ip import image_width
    from ldm.checkpoints.image_encoder import check_encoder, encoder_folder
    from ldm.images.canvas import open_canvas
    from ldm.images.hints import read_hint
    from ldm.images.source import read_image

    for file, image, *_ in job.controls:
        _check_order(file, image)
        path = control_file(file)
        network = read_control(path)
        if network.is_image_prompt:
            folder, (states, width) = encoder_folder(path), image_width(network.weights)
            if width:  # else the file will be refused
                check_encoder(folder, states, width)
            read_image(image)
            continue
        read_hint(job, image, (job.height, job.width), partial(open_canvas, own_side=side))


def _check_order(file: str, image: str) -> None:
    """Raises `InputError`, with what to type instead, where one of the two is what the other should be."""
    from ldm.images.source import EXTENSIONS

    first, second = printable(file), printable(image)
    typed = f"--control {first}:{second}"[:200]
    if _NUMBER.fullmatch(file) and not find(file).exists():
        raise InputError(f"{typed}: the weight comes last; give --control {second}:{first}")
    is_image, is_network = file.lower().endswith(EXTENSIONS), image.lower().endswith((*MODEL_ENDINGS, ".pth"))
    if is_image and is_network:
        raise InputError(f"{typed}: the network comes first; give --control {second}:{first}")
    if is_image:
        raise InputError(
            f"{typed}: {first} is an image, where the file of a network belongs; give --control FILE:{first}"
        )
    if is_network:
        raise InputError(
            f"{typed}: {second} holds weights, where the image belongs; each network has a --control and an image "
            f"of its own: --control {first}:IMAGE"
        )
