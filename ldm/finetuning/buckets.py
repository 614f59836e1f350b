"""Sizes of one area and several proportions, so that images of a batch need no borders and lose little.

Training at one square size would crop every other image to a square. Instead, each image gets the size, of those of
nearly the same area, whose proportions are nearest to its own ("aspect ratio bucketing", NovelAI 2022), is scaled so
that it covers this size, and what projects is cropped off.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

Size = tuple[int, int]  # width, height in pixels


class Placement(NamedTuple):
    """How an image comes to a bucket's size: scaled to `scaled`, then `size` pixels are cut out at `corner`."""

    size: Size
    scaled: Size
    corner: tuple[int, int]  # left, top


def bucket_sizes(side: int, step: int, least: int | None = None, most: int | None = None) -> list[Size]:
    """Returns all sizes in multiples of `step` with an area of at most `side` * `side`, widest first.

    The shorter side is at least `least` pixels (by default half of `side`), the longer at most `most` (twice).
    For each width the height is the largest that the area allows, so neighbours differ by one step.
    """
    least = max(step, side // 2) if least is None else least
    most = 2 * side if most is None else most
    square = side // step * step
    sizes = {(square, square)}
    for width in range(math.ceil(least / step) * step, most + 1, step):
        height = min(most, side * side // width) // step * step
        if height >= least:
            sizes |= {(width, height), (height, width)}
    return sorted(sizes, key=lambda size: (-size[0] / size[1], size))


def place(size: Size, sizes: Sequence[Size], where: tuple[float, float] = (0.5, 0.5)) -> Placement:
    """Chooses the bucket for an image of `size`: the one of the nearest proportions, by the ratio of the two.

    The image is scaled until it covers the bucket; `where`, from (0, 0) to (1, 1), chooses what is
    cut off: half on each side by default.
    """
    width, height = size
    bucket = min(sizes, key=lambda own: (abs(math.log(own[0] / own[1] * height / width)), -own[0] * own[1]))
    factor = max(bucket[0] / width, bucket[1] / height)
    scaled = max(bucket[0], round(width * factor)), max(bucket[1], round(height * factor))
    corner = tuple(
        round((long - short) * part) for long, short, part in zip(scaled, bucket, where, strict=True)
    )
    return Placement(bucket, scaled, (corner[0], corner[1]))


def step_for(side: int, factor: int) -> int:
    """Returns the usual step of bucket sizes: 64 pixels from 512 up, an eighth of smaller sides; of `factor`."""
    return max(factor, min(64, side // 8) // factor * factor)
