"""The hints of control networks as files, next to the images that they hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.job import Init, Job

if TYPE_CHECKING:
    from ldm.images.canvas import Canvas

HINTS = "hints"  # the folder, in that of a run


def write_hints(folder: Path, canvases: Callable[[Init], Canvas], image: Path, job: Job) -> None:
    """Writes the hints of a job to files NAME-0.png, NAME-1.png, ..., called after its image; those there go."""
    from ldm.checkpoints.adapters.control import control_file, read_control
    from ldm.images.hints import hints_of, shown_hint
    from ldm.images.writer import encode_png, publish

    # without the images of IP-Adapters
    controls = [one for one in job.controls if not read_control(control_file(one[0])).is_image_prompt]
    if not controls:
        return
    (folder / HINTS).mkdir(exist_ok=True)
    for i, hint in enumerate(hints_of(replace(job, controls=tuple(controls)), canvases)):
        publish(folder / HINTS / f"{image.stem}-{i}.png", encode_png(shown_hint(hint)), overwrite=True)


def hint_files(image: Path) -> list[Path]:
    """The files that `write_hints` wrote for an image of a run, in their order."""
    place = image.parent.parent / HINTS
    count = len(list(place.glob(f"{image.stem}-*.png"))) if place.is_dir() else 0
    return [path for i in range(count) if (path := place / f"{image.stem}-{i}.png").is_file()]
