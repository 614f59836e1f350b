"""Distances between two sets of features: Fréchet, kernel (MMD), precision and recall.

Features are float32 or float64 arrays [N, D], also memory-mapped ones, which are read in blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.floating]
BLOCK = 1024  # rows in memory at a time
KID_LIMIT = 10_000  # images: the kernel's cost grows with the square of their number
NEIGHBOURS = 3


@dataclass(frozen=True)
class Gaussian:
    """The mean [D] and covariance [D, D] (divided by N - 1) of N features, in float64."""

    count: int
    mean: Array
    covariance: Array


def blocks(features: Array) -> Iterator[tuple[slice, Array]]:
    """Yields the rows of features in blocks, in float64."""
    for start in range(0, len(features), BLOCK):
        rows = slice(start, start + BLOCK)
        yield rows, np.asarray(features[rows], np.float64)


def gaussian_of(features: Array, weights: npt.ArrayLike | None = None) -> Gaussian:
    """Returns the mean and covariance of features; `weights` [N] count how often each occurs (None: once).

    One pass for the mean and one for the covariance, so that large means lose no digits.
    """
    counts = np.ones(len(features)) if weights is None else np.asarray(weights, np.float64)
    total, width = counts.sum(), features.shape[1]
    mean, covariance = np.zeros(width), np.zeros((width, width))
    for rows, x in blocks(features):
        mean += counts[rows] @ x
    mean /= total
    for rows, x in blocks(features):
        x -= mean
        covariance += (x * counts[rows, None]).T @ x
    return Gaussian(int(total), mean, covariance / max(total - 1, 1))


class Frechet:
    """The squared Fréchet distance of Gaussians to one reference: |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)).

    Heusel et al., arXiv:1706.08500, equation 6; Dowson and Landau 1982. The trace of (S1 S2)^(1/2) is the sum of the
    roots of the eigenvalues of R S1 R with R = S2^(1/2), which is symmetric, so all of them are real.
    """

    def __init__(self, reference: Gaussian) -> None:
        self._reference = reference
        values, vectors = np.linalg.eigh(reference.covariance)
        self._root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T

    def __call__(self, other: Gaussian) -> float:
        apart = other.mean - self._reference.mean
        shared = np.linalg.eigvalsh(self._root @ other.covariance @ self._root)
        traces = np.trace(other.covariance) + np.trace(self._reference.covariance)
        return float(apart @ apart + traces - 2 * np.sqrt(np.clip(shared, 0, None)).sum())


def kernel(x: Array, y: Array) -> Array:
    """Returns (x.y / D + 1)^3 of all pairs: [N, M]. Bińkowski et al., arXiv:1801.01401, section 4."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def kernel_distance(x: Array, y: Array, weights: npt.ArrayLike | None = None) -> Array:
    """Returns the unbiased squared MMD of features [N, D] and [M, D] (KID), for each row of weights [B, N] of x.

    Without weights each occurs once: [1]. Pairs of an image with itself are left out, also where weights repeat it.
    """
    counts = np.ones((1, len(x))) if weights is None else np.asarray(weights, np.float64)
    within, across = np.zeros(len(counts)), np.zeros(len(counts))
    others = [part for _, part in blocks(y)]
    for rows, part in blocks(x):
        own = counts[:, rows]
        for columns, other in blocks(x):
            within += ((own @ kernel(part, other)) * counts[:, columns]).sum(1)
        within -= (own**2) @ (np.einsum("nd,nd->n", part, part) / x.shape[1] + 1) ** 3
        across += own @ sum(kernel(part, other).sum(1) for other in others)
    of_reference = sum(kernel(a, b).sum() for a in others for b in others)
    of_reference -= sum(((np.einsum("nd,nd->n", a, a) / y.shape[1] + 1) ** 3).sum() for a in others)
    total, pairs = counts.sum(1), counts.sum(1) ** 2 - (counts**2).sum(1)
    return within / pairs + of_reference / (len(y) * (len(y) - 1)) - 2 * across / (total * len(y))


def thinned(features: Array, limit: int = KID_LIMIT) -> Array:
    """Returns at most `limit` of the features, evenly spaced."""
    if len(features) <= limit:
        return features
    return features[np.linspace(0, len(features) - 1, limit).round().astype(int)]


def inside(x: Array, manifold: Array) -> npt.NDArray[np.bool_]:
    """Returns for each feature [N, D] whether it is in the manifold of others [M, D]: [N].

    The manifold is the union of balls about each of them, up to its third nearest neighbour (Kynkäänniemi et al.,
    arXiv:1904.06991, section 2): precision is the mean of generated features in that of references, recall the
    reverse.
    """
    parts = [part for _, part in blocks(manifold)]
    radii = [
        np.partition(np.concatenate([_apart(part, other) for other in parts], 1), NEIGHBOURS)[:, NEIGHBOURS]
        for part in parts
    ]
    found = [
        np.any([(_apart(rows, part) <= radius).any(1) for part, radius in zip(parts, radii, strict=True)], 0)
        for _, rows in blocks(x)
    ]
    return np.concatenate(found)


def _apart(x: Array, y: Array) -> Array:
    """Returns the squared distances of all pairs: [N, M]; exactly 0 for a feature and itself."""
    squares = (x**2).sum(1)[:, None] + (y**2).sum(1) - 2 * (x @ y.T)
    close = squares < 1e-9 * (1 + (x**2).sum(1)[:, None])
    squares[close] = 0
    return squares
