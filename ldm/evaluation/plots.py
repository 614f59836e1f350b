"""The model cards' plot: Fréchet distance against text-image score, a curve for each variant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.evaluation.results import Result
from ldm.plots import new_figure, save_figure
from ldm.util import need, printable

FORMATS = ("png", "svg")
_X, _Y = ("clip", "answers"), ("fid", "fd_dinov2", "kid")  # the first that there is
_TITLES = {
    "clip": "CLIP score",
    "answers": "text-image score of the reader (%)",
    "fid": "FID",
    "fd_dinov2": "FD-DINOv2",
    "kid": "KID",
}


@dataclass(frozen=True)
class Curve:
    """The points of a variant, in the order of their settings: labels, x and y."""

    name: str
    labels: tuple[str, ...]
    x: tuple[Result, ...]
    y: tuple[Result, ...]

    @property
    def best(self) -> int:
        """The number of the point with the lowest y."""
        return min(range(len(self.y)), key=lambda i: self.y[i].value)


def curves(results: Sequence[Result], x: str = "", y: str = "") -> tuple[str, str, list[Curve]]:
    """Returns the metrics of the axes and the curves; an empty name means the first of the usual ones.

    Raises InputError if no set of images has both.
    """
    have = {result.metric for result in results}
    x = x or next((name for name in _X if name in have), _X[0])
    y = y or next((name for name in _Y if name in have), _Y[0])
    found: dict[str, dict[str, dict[str, Result]]] = {}
    for result in results:
        found.setdefault(result.variant, {}).setdefault(result.images_of, {})[result.metric] = result
    made: list[Curve] = []
    for variant, sets in found.items():
        points = sorted(
            (own for own in sets.values() if x in own and y in own), key=lambda own: _order(own[y].settings)
        )
        if points:
            labels = tuple(_label(point[y].settings) for point in points)
            made.append(Curve(variant, labels, tuple(p[x] for p in points), tuple(p[y] for p in points)))
    need(
        bool(made),
        f"no images have both {x} and {y}: their metrics are {', '.join(sorted(have)) or 'none'}; run `score`",
    )
    return x, y, made


def makes_a_curve(results: Sequence[Result]) -> bool:
    """Whether there are a distance and a text-image score, the two sides of the plot."""
    metrics = {result.metric for result in results}
    return not metrics.isdisjoint(_X) and not metrics.isdisjoint(_Y)


def _order(settings: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple((str(value.__class__), value) for value in settings.values())


def _label(settings: Mapping[str, Any]) -> str:
    values = [f"{value:g}" if isinstance(value, float) else str(value) for value in settings.values()]
    return ", ".join(values)


def plot(results: Sequence[Result], path: Path, x: str = "", y: str = "") -> list[Path]:
    """Draws the curves as `path` with .png and .svg; returns both. Bars are the intervals.

    Raises InputError if there is nothing to draw or matplotlib is missing.
    """
    horizontal, vertical, drawn = curves(results, x, y)
    figure = new_figure(6, 4.2)
    axes = figure.add_subplot()
    for curve in drawn:
        across, up = ([result.value for result in side] for side in (curve.x, curve.y))
        axes.errorbar(across, up, yerr=_bars(curve.y), xerr=_bars(curve.x), marker="o", capsize=2, elinewidth=0.6,
                      label=printable(curve.name) if curve.name else None)  # fmt: skip
        for label, place in zip(curve.labels, zip(across, up, strict=True), strict=True):
            axes.annotate(label, place, (5, 5), textcoords="offset points", fontsize=8)
    names = list(drawn[0].y[0].settings)
    axes.set_xlabel(_TITLES.get(horizontal, horizontal))
    axes.set_ylabel(_TITLES.get(vertical, vertical))
    axes.set_title(
        f"{drawn[0].y[0].images} images a point" + (f"; labels: {', '.join(names)}" if names else ""),
        fontsize=9,
    )
    axes.grid(alpha=0.3)
    if len(drawn) > 1:
        axes.legend()
    return save_figure(figure, path, FORMATS)


def _bars(results: Sequence[Result]) -> list[list[float]] | None:
    """Returns how far the intervals reach below and above the values; None if one lacks them."""
    if any(result.low is None or result.high is None for result in results):
        return None
    return [
        [result.value - (result.low or 0) for result in results],
        [(result.high or 0) - result.value for result in results],
    ]
