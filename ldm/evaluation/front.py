"""Quality over time: which settings no other one beats in both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ldm.evaluation.compare import SHARE
from ldm.evaluation.results import Result
from ldm.plots import new_figure, save_figure
from ldm.util import printable

_QUALITIES = {"right": "right images, %", "answers": "text-image score of the reader, %", "psnr": "PSNR, dB"}


Point = tuple[float, float]  # share of time, quality


def front(points: Sequence[Point]) -> list[int]:
    """Returns the numbers of the points that are on the Pareto front, in the order of time.

    A point is on it if every other one that is as fast has less quality. Of equal points the first counts.
    """
    found: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1], i)):
        if not found or points[i][1] > points[found[-1]][1]:
            found.append(i)
    return found


def qualities(
    results: Sequence[Result], first: str, others: Sequence[str]
) -> dict[str, dict[str, tuple[float, float]]]:
    """Returns (share of time, quality) by metric and set, for the metrics that all of these sets have.

    Those of the `first` set, with which the others are compared, have the time 1.
    """
    value: dict[tuple[str, str], float] = {(r.images_of, r.metric): r.value for r in results}
    time = {first: 1.0, **{name: value[f"{first} and {name}", SHARE] for name in others}}
    found: dict[str, dict[str, Point]] = {}
    for metric in _QUALITIES:
        key = {name: (f"{first} and {name}" if metric == "psnr" else name, metric) for name in time}
        have = {name: (time[name], value[key[name]]) for name in time if key[name] in value}
        if set(others) <= set(have):
            found[metric] = have
    return found


def plot_front(
    measured: Mapping[str, Mapping[str, Point]], path: Path, across: str = "CPU time, as a share of the first"
) -> None:
    """Draws quality over time as the PNG file `path`, a plot for each metric with its front.

    Raises `InputError` without matplotlib.
    """
    figure = new_figure(5.5 * len(measured), 4.5)
    for number, (metric, sets) in enumerate(measured.items(), 1):
        axes = figure.add_subplot(1, len(measured), number)
        points = list(sets.values())
        best = [points[i] for i in front(points)]
        axes.step([time for time, _ in best], [quality for _, quality in best], where="post", lw=0.8)
        axes.plot([time for time, _ in points], [quality for _, quality in points], "o", ms=4)
        for name, place in sets.items():
            axes.annotate(printable(name), place, (4, 3), textcoords="offset points", fontsize=7)
        axes.set(xlabel=across, ylabel=_QUALITIES[metric])
        axes.grid(alpha=0.3)
    save_figure(figure, path.with_suffix(""))
