"""Pairs of images of the same prompts and seeds: how two checkpoints, precisions or options differ."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ldm.evaluation.bootstrap import mean_of
from ldm.evaluation.images import ImageSet
from ldm.evaluation.pairs import Lpips, psnr, ssim
from ldm.evaluation.prompts import Question
from ldm.evaluation.results import Result
from ldm.files import written_whole
from ldm.util import need, printable

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
    values = [measure(a.pixels(), b.pixels()) for a, b in zip(first.items, second.items, strict=True)]
    return [min(value, SAME_PSNR) for value in values] if metric == "psnr" else values


def pair_results(
    first: ImageSet, second: ImageSet, metrics: Sequence[str], lpips: str | None = None
) -> list[Result]:
    """Returns the mean of each metric over the pairs, with its interval."""
    found = []
    for metric in metrics:
        estimate = mean_of(pair_values(first, second, metric, lpips))
        found.append(Result(f"{first.name} and {second.name}", metric, estimate.value, estimate.low, estimate.high,
                            len(first), note="mean over pairs"))  # fmt: skip
    return found


def paired_difference(name: str, metric: str, first: Sequence[float], second: Sequence[float]) -> Result:
    """Returns the mean of second less first over pairs, with the interval of the paired bootstrap."""
    apart = np.asarray(second, np.float64) - np.asarray(first, np.float64)
    estimate = mean_of(apart)
    return Result(
        name,
        f"{metric} difference",
        estimate.value,
        estimate.low,
        estimate.high,
        len(apart),
        note="second less first",
    )


def write_sheet(
    path: Path, first: ImageSet, second: ImageSet, values: Sequence[float], questions: Sequence[Question]
) -> None:
    """Writes a sheet of the pairs with the lowest values (PSNR): a row a pair, with its prompt and value."""
    from ldm.images.sheet import sheet

    order = np.argsort(values, kind="stable")[:SHOWN]
    images = [part.items[i].pixels() for i in order for part in (first, second)]
    prompts = [questions[i].prompt if questions else first.items[i].name for i in order]
    rows = [f"{values[i]:.1f} dB: {prompt}" for i, prompt in zip(order, prompts, strict=True)]
    page = sheet(images, rows, [first.name, second.name], "the pairs that differ most")
    with written_whole(path, overwrite=True) as part:
        page.save(part, "PNG")
