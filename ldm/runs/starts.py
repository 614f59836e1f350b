"""The starts of jobs: text alone, or images fitted to the canvas."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ldm.job import Init
from ldm.runs.models import latent_factor, own_side
from ldm.runs.options import Request
from ldm.util import need, printable

if TYPE_CHECKING:
    from ldm.images.canvas import Canvas

logger = logging.getLogger("ldm")


@dataclass(frozen=True)
class Start:
    """The values shared by the jobs of one starting image, or of none: the image and their size in pixels."""

    init: Init | None
    width: int
    height: int


class Canvases:
    """Opens the starting images of jobs; the last few are cached. One that changes during a run is refused."""

    def __init__(self, mask_needed: bool, model: Mapping[str, Any]) -> None:
        """`model` is a checked config's, in whose size a region of an image is made if no other is given."""
        from ldm.images.canvas import open_canvas

        opening = functools.partial(open_canvas, mask_needed=mask_needed, own_side=own_side(model))
        self._open = functools.lru_cache(maxsize=8)(opening)
        self._digests: dict[Init, tuple[str, str]] = {}

    def __call__(self, init: Init) -> Canvas:
        canvas = self._open(init)
        first = self._digests.setdefault(init, (canvas.digest, canvas.mask_digest))
        for path, then, now in zip(
            (init.image, init.mask), first, (canvas.digest, canvas.mask_digest), strict=True
        ):
            need(then == now, f"{printable(path)} has changed since this run began; start again")
        return canvas


def read_starts(
    request: Request, masked: bool, model: Mapping[str, Any], canvases: Callable[[Init], Canvas]
) -> list[Start]:
    """Returns the starts of the jobs: each image, fitted to the canvas, or text alone unless a mask is needed."""
    if not (request.images or request.folder):
        need(not masked, "give an image with --init-img, or a folder of pairs with --indir")
        return [Start(None, *own_size(request, model))]
    starts: list[Start] = []
    for init in inits_of(request, masked):
        canvas = canvases(init)
        for note in canvas.notes:
            logger.info("%s: %s", printable(init.image), note)
        height, width, _ = canvas.pixels.shape
        starts.append(Start(init, width, height))
    return starts


def inits_of(request: Request, masked: bool) -> list[Init]:
    """Returns each starting image; with `masked` one without a mask uses its transparency."""
    from ldm.images.folders import find_images, find_pairs

    start, folder = request.start, request.folder
    need(not (folder and (request.images or start.mask)), "--indir goes without --init-img and --mask")
    pairs = find_pairs(folder) if folder else [(path, start.mask) for path in find_images(request.images)]
    return [replace(start, image=image, mask=mask, alpha_mask=masked and not mask) for image, mask in pairs]


def own_size(request: Request, model: Mapping[str, Any]) -> tuple[int, int]:
    """Returns width and height of an image from text, by default the config's, checked against its factor."""
    factor = latent_factor(model)
    size: list[int] = []
    for name, given in (("W", request.job.width), ("H", request.job.height)):
        side = given or own_side(model)
        below, above = side // factor * factor, -(-side // factor) * factor
        nearest = f"{below} or {above}" if below >= factor else str(max(above, factor))
        need(side % factor == 0, f"--{name} is {side}, not a multiple of {factor}; use {nearest}")
        size.append(side)
    return size[0], size[1]
