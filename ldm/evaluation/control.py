"""Measures a ControlNet of the bundled model: whether solids stand where the edges of a rendered scene have them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ldm.data.layout import centres
from ldm.data.scenes import Scene, image_at, render
from ldm.evaluation.drawn import Make, draw, images_of, share, write_sheet
from ldm.evaluation.lessons import READER
from ldm.images.hints import make_hint, shown_hint
from ldm.places import find
from ldm.training.evaluate import Captioned
from ldm.training.quality import load_reader

HINT = "canny"
NEAR = 8.0  # pixels, a sixteenth of the side
PLACES = ("anywhere", "middle")  # where the solids of the hints stand


class Measured(NamedTuple):
    """Of images that were drawn `drawn` ("without" or "with" hints), against renderings with solids in a place.

    The share of centres within `NEAR`, the mean distance of all in pixels, and the share of images in which all is
    right: for solids in the middle only, as the reader has seen no others.
    """

    place: str
    drawn: str
    near: float
    distance: float
    right: float | None


def measure(
    folder: Path, count: int, control: Path, options: Sequence[str], make: Make
) -> list[Measured] | int:
    """Draws `count` prompts without and with hints of where their solids stand, with txt2img's `options`.

    Half of the scenes are of pairs that the model was never trained on. Each is drawn once without a hint, and once
    with each of `PLACES`. Returns a row for each place without and with hints, or an exit code of `make` that is not
    0. A colour that is not in an image is as far away as its side is long.
    """
    captioned, reader = Captioned.draw(count, seed=0), load_reader(find(READER))
    rows: list[dict[str, Any]] = [{"prompt": prompt} for prompt in captioned.prompts]
    drawn = draw(folder / "without", rows, options, make)
    found: list[Measured] = []
    for place in PLACES:
        if isinstance(drawn, int):
            return drawn
        renderings = _write_renderings(folder / f"renderings-{place}", captioned, place)
        files = [str((folder / f"renderings-{place}" / f"{i:03}.png").absolute()) for i in range(count)]
        hints = [{"control": [[str(control), file, 1.0, 0.0, 1.0]], "hint": HINT} for file in files]
        own = [{**row, **hint} for row, hint in zip(rows, hints, strict=True)]
        controlled = draw(folder / f"with-{place}", own, options, make)
        if isinstance(controlled, int):
            return controlled
        for name, images in (("without", drawn), ("with", controlled)):
            marks = captioned.marks(reader, images) if place == "middle" else None
            found.append(_measured(place, name, images, renderings, captioned.scenes, marks))
    return found


def _write_renderings(folder: Path, captioned: Captioned, place: str) -> np.ndarray:
    folder.mkdir(parents=True, exist_ok=True)
    images: list[np.ndarray] = []
    for i, (split, scene) in enumerate(zip(captioned.splits, captioned.scenes, strict=True)):
        number = i - captioned.splits.index(split)
        image = render(scene, number, anywhere=True) if place == "anywhere" else image_at(i, split)
        Image.fromarray(image).save(folder / f"{i:03}.png")
        images.append(image)
    return np.stack(images)


def _measured(
    place: str,
    drawn: str,
    images: np.ndarray,
    renderings: np.ndarray,
    scenes: Sequence[Scene],
    marks: Sequence[Mapping[str, bool]] | None,
) -> Measured:
    distances = [
        distance
        for image, rendering, scene in zip(images, renderings, scenes, strict=True)
        for distance in _distances(image, rendering, scene)
    ]
    near = share([distance <= NEAR for distance in distances])
    right = None if marks is None else share([mark["all"] for mark in marks])
    return Measured(place, drawn, near, float(np.mean(distances)), right)


def _distances(image: np.ndarray, rendering: np.ndarray, scene: Scene) -> list[float]:
    found, wanted = centres(image, scene), centres(rendering, scene)
    return [
        float(image.shape[1]) if own is None else float(np.hypot(own[0] - place[0], own[1] - place[1]))
        for colour, place in wanted.items()
        if place is not None  # else it is hidden in the rendering too
        for own in [found[colour]]
    ]


def as_markdown(found: Sequence[Measured]) -> str:
    """Returns the table, a row for each kind of image."""
    lines = [
        f"| solids of the hint | | centres within {NEAR:g} px | mean distance | everything right |",
        "|---|---|---|---|---|",
    ]
    for row in found:
        right = "" if row.right is None else f"{row.right:.1%}"
        lines.append(f"| {row.place} | {row.drawn} | {row.near:.1%} | {row.distance:.1f} px | {right} |")
    return "\n".join(lines)


def write_examples(folder: Path, columns: int = 8) -> Path:
    """Writes the first hints and the images without and with them, a row each; returns the file."""
    rendered, *drawn = (
        images_of(folder / name, columns) for name in ("renderings-anywhere", "without", "with-anywhere")
    )
    hints = [shown_hint(make_hint(HINT, image)) for image in rendered]
    return write_sheet(folder / "control.png", [hints, *drawn])
