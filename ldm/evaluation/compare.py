"""Pairs of images of the same prompts and seeds: how two checkpoints, precisions or options differ."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ldm.evaluation.bootstrap import Estimate, mean_of
from ldm.evaluation.images import ImageSet
from ldm.evaluation.pairs import Lpips, psnr, ssim
from ldm.evaluation.prompts import Question
from ldm.evaluation.results import Result
from ldm.files import written_whole
from ldm.util import need, printable

if TYPE_CHECKING:
    from ldm.evaluation.score import Scorer

PAIRED = ("psnr", "ssim", "lpips")
TIME, SHARE = "seconds", "share of time"
SAME_PSNR = 100.0  # dB, in place of infinity for equal images
SHOWN = 6  # pairs on the sheet


def pair_values(first: ImageSet, second: ImageSet, metric: str, lpips: str | None = None) -> list[float]:
    """Returns the metric (psnr, ssim or lpips) of each pair of images, by their order.

    The PSNR of equal images counts as 100 dB. Raises InputError for sets of different lengths or sizes.
    """
    need(
        len(first) == len(second),
        f"{printable(first.name)} has {len(first)} images and {printable(second.name)} {len(second)}; give as many",
    )
    measure = {"psnr": psnr, "ssim": ssim}.get(metric) or Lpips(lpips)
    values: list[float] = [
        measure(a.pixels(), b.pixels()) for a, b in zip(first.items, second.items, strict=True)
    ]
    return [min(value, SAME_PSNR) for value in values] if metric == "psnr" else values


def compare_sets(
    first: ImageSet, second: ImageSet, scorer: Scorer, questions: Sequence[Question] | None
) -> tuple[list[Result], list[float]]:
    """Returns the figures of two sets of the same prompts and seeds, and the PSNR of each pair.

    Metrics of pairs (psnr, ssim, lpips) are means over the pairs. Of a metric of images there is the mean of each set
    and, from the differences of the pairs, that of second less first with the interval of the paired bootstrap.
    """
    from ldm.evaluation.score import OF_IMAGES

    for metric in scorer.request.metrics:
        need(
            metric in (*PAIRED, *OF_IMAGES),
            f"--metrics {metric}: pairs have {', '.join((*PAIRED, *OF_IMAGES))}",
        )
    name = f"{first.name} and {second.name}"
    found: list[Result] = []
    psnrs = pair_values(first, second, "psnr")
    for metric in scorer.request.metrics:
        if metric in PAIRED:
            values = (
                psnrs
                if metric == "psnr"
                else pair_values(first, second, metric, scorer.request.paths.get("lpips"))
            )
            found.append(_result(name, metric, mean_of(values), len(values), "mean over pairs"))
            continue
        scores: list[np.ndarray] = []
        for images in (first, second):
            own, network = scorer.image_scores(images, metric, questions)
            found.append(scorer.result(images, metric, mean_of(own), network))
            scores.append(own)
        found.append(
            _result(
                name, f"{metric} difference", mean_of(scores[1] - scores[0]), len(psnrs), "second less first"
            )
        )
    return found, psnrs


def times(first: tuple[str, float], second: tuple[str, float], images: int) -> list[Result]:
    """Returns the CPU seconds of an image of two sets, by name, and those of the second as a share of the first's."""
    each = [
        Result(name, TIME, seconds, None, None, images, note="CPU seconds an image, of all threads")
        for name, seconds in (first, second)
    ]
    name, share = f"{first[0]} and {second[0]}", second[1] / first[1]
    return [*each, Result(name, SHARE, share, None, None, images, note="second / first")]


def _result(name: str, metric: str, estimate: Estimate, images: int, note: str) -> Result:
    return Result(name, metric, estimate.value, estimate.low, estimate.high, images, note=note)


def write_sheet(
    path: Path, first: ImageSet, second: ImageSet, values: Sequence[float], questions: Sequence[Question]
) -> None:
    """Writes a sheet of the pairs with the lowest values (PSNR): a row a pair, with its prompt and value."""
    from ldm.images.sheet import sheet

    order = [int(i) for i in np.argsort(values, kind="stable")[:SHOWN]]
    images = [part.items[i].pixels() for i in order for part in (first, second)]
    prompts = [questions[i].prompt if questions else first.items[i].name for i in order]
    rows = [f"{values[i]:.1f} dB: {prompt}" for i, prompt in zip(order, prompts, strict=True)]
    page = sheet(images, rows, [first.name, second.name], "the pairs that differ most")
    with written_whole(path, overwrite=True) as part:
        page.save(part, "PNG")
