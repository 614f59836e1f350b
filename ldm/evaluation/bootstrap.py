"""Bootstrap intervals (Efron 1979): figures of resampled images, with the references as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

CONFIDENCE = 0.95
RESAMPLES = 100  # of figures that are slow to compute
MANY = 2_000  # of means


@dataclass(frozen=True)
class Estimate:
    """A figure and the ends of its interval of 95 %; NaN ends without resamples."""

    value: float
    low: float = float("nan")
    high: float = float("nan")

    def __str__(self) -> str:
        return (
            f"{self.value:.4g} ({self.low:.4g} to {self.high:.4g})"
            if self.low == self.low
            else f"{self.value:.4g}"
        )


def draws(count: int, resamples: int, seed: int = 0) -> npt.NDArray[np.int64]:
    """Returns how often each of `count` images occurs in each resample: [resamples, count]; rows sum to `count`."""
    return np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)


def around(value: float, replicates: Sequence[float] | npt.NDArray[np.floating]) -> Estimate:
    """Returns a figure with the quantiles of its replicates, moved so that their mean is the figure.

    Repeated images bias distances such as FID upwards; the move takes that out of the interval.
    """
    if len(replicates) < 2:
        return Estimate(value)
    spread = np.asarray(replicates, np.float64) - np.mean(replicates)
    low, high = np.quantile(spread, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(value, value + float(low), value + float(high))


def mean_of(
    values: Sequence[float] | npt.NDArray[np.floating], resamples: int = MANY, seed: int = 0
) -> Estimate:
    """Returns the mean of values, one an image, and its interval."""
    x = np.asarray(values, np.float64)
    rng = np.random.default_rng(seed)
    means = [x[rng.integers(len(x), size=len(x))].mean() for _ in range(resamples if len(x) > 1 else 0)]
    return around(float(x.mean()), means)
