"""The noise that steps add, where it does not come from the stream that a run began with.

Other programs draw it from a generator of its own, or from a Brownian path in sigma: for a step from `start` to `end`
it is (W(end) - W(start)) / sqrt(start - end), so that runs of any number of steps, however they divide the levels,
follow one path. The path here is that of `torchsde.BrownianTree` (version 0.2.6), which k-diffusion's
`BrownianTreeNoiseSampler` reads with one seed for each image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ldm.models.diffusion.noise import Generator, NoiseSource, noise_source, stream

DECIMALS = 6  # of sigma: the tree is not divided further
POOL = 24  # words in which NumPy keeps the entropy of a seed


class StepNoise(Protocol):
    """The noise of the steps of one run."""

    def between(self, shape: Sequence[int], start: float, end: float) -> Tensor:
        """Returns standard normal numbers in `shape` [batch, ...] for a step between two levels of sigma."""
        ...

    def skip(self, shape: Sequence[int]) -> None:
        """Passes over the noise of a step that has no use for it."""
        ...


# (the positive levels of a schedule, falling, and the one at which a run begins) -> the noise of its steps
StartRun = Callable[[Sequence[float], float], StepNoise]


class SeparateSteps:
    """A source of noise for everything but steps, whose noise starts from its beginning in each run of a sampler."""

    def __init__(self, source: NoiseSource, start_run: StartRun) -> None:
        self.draw, self.skip = source.draw, source.skip
        self.start_run = start_run


class StreamOfSteps:
    """A stream of noise for steps, in their order."""

    def __init__(self, source: NoiseSource) -> None:
        self.skip = source.skip
        self._source = source

    def between(self, shape: Sequence[int], start: float, end: float) -> Tensor:
        return self._source.draw(shape)


class BrownianPath:
    """A Brownian path W over sigmas from `low` to `high`, a function of its seed and its shape alone.

    W is halved down to a level: given its ends, the middle of a Brownian path is normal (Lévy's construction).
    Each middle has a seed, made of the path's and of its place, for a generator `rng` of `noise_source`.
    """

    def __init__(
        self, rng: Generator, seed: int, low: float, high: float, device: torch.device | str
    ) -> None:
        self._rng: Generator = rng
        self._seed, self._device = seed, device
        # as the programs, which have levels in float32
        self.low, self.high = (round(float(np.float32(sigma)), DECIMALS) for sigma in (low, high))
        self._known: dict[float, Tensor] = {}

    def increment(self, shape: Sequence[int], start: float, end: float) -> Tensor:
        """Returns the noise in `shape` [1, ...] of a step from `start` to `end`, with variance 1."""
        there, here = (float(np.float32(sigma)) for sigma in (end, start))
        length = abs(here - there)
        return (self._at(there, shape) - self._at(here, shape)) / length**0.5

    def _at(self, sigma: float, shape: Sequence[int]) -> Tensor:
        place = min(max(round(sigma, DECIMALS), self.low), self.high)
        if place not in self._known:
            self._known[place] = self._find(place, shape)
        return self._known[place]

    def _find(self, place: float, shape: Sequence[int]) -> Tensor:
        """Returns W(place) - W(low)."""
        low, high, node, depth = self.low, self.high, 0, 0
        before = torch.zeros(tuple(shape), device=self._device)
        inside = (
            self._normal((), shape) * (high - low) ** 0.5
        )  # W(high) - W(low) of the part that has the place
        while low < place < high:
            middle = 0.5 * (low + high)
            left, right, whole = round(middle, DECIMALS) - low, high - round(middle, DECIMALS), high - low
            first = left / whole * inside + (left * right / whole) ** 0.5 * self._normal((node, depth), shape)
            middle = round(middle, DECIMALS)
            if place < middle:
                high, inside, node = middle, first, 2 * node
            else:
                low, before, inside, node = middle, before + first, inside - first, 2 * node + 1
            depth += 1
        return before if place == low else before + inside

    def _normal(self, place: tuple[int, ...], shape: Sequence[int]) -> Tensor:
        """Returns the normal numbers of a middle, whose place is its number in a row of the tree and that row's."""
        sequence = np.random.SeedSequence(self._seed, spawn_key=place, pool_size=POOL)
        return stream(self._rng, int(sequence.generate_state(1)[0]), self._device).draw(shape)


class BrownianSteps:
    """The paths of a batch, one for each image."""

    def __init__(self, paths: Sequence[BrownianPath]) -> None:
        self._paths = list(paths)

    def between(self, shape: Sequence[int], start: float, end: float) -> Tensor:
        if shape[0] != len(self._paths):
            raise ValueError(f"{len(self._paths)} paths of noise, one an image, for a batch of {shape[0]}")
        one = (1, *shape[1:])
        return torch.cat([path.increment(one, start, end) for path in self._paths])

    def skip(self, shape: Sequence[int]) -> None:
        """Levels have their noise whatever was used before."""


def stream_of_steps(rng: Generator, seeds: Sequence[int], device: torch.device | str) -> StartRun:
    """Returns what gives steps the stream of each image's seed, from its beginning."""
    return lambda levels, first: StreamOfSteps(noise_source(rng, "image", seeds, device))


def brownian_steps(
    rng: Generator, seeds: Sequence[int], device: torch.device | str, whole: bool = True
) -> StartRun:
    """Returns what gives steps a path for each image's seed.

    It reaches over the `whole` schedule (AUTOMATIC1111's web UI), or from where a run begins (ComfyUI).
    """

    def start_run(levels: Sequence[float], first: float) -> StepNoise:
        low, high = min(levels), max(levels) if whole else first
        return BrownianSteps([BrownianPath(rng, seed, low, high, device) for seed in seeds])

    return start_run
