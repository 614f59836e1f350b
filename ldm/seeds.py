"""The seeds that noise generators take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ldm.job import Job
from ldm.util import InputError

# The highest seed of each noise generator. Of longer ones than 32 bits torch's on the CPU uses the lower 32.
MAX_SEEDS: Mapping[str, int] = {
    "philox": 2**64 - 1,
    "cpu": 2**64 - 1,
    "device": 2**32 - 1,
    "numpy": 2**32 - 1,
}


def check_seed(seed: int, rng: str) -> None:
    """Checks that a noise generator accepts a seed, else raises InputError; both are valid values of their fields."""
    if seed > MAX_SEEDS[rng]:
        raise InputError(
            f"seed is {seed}, but the noise generator {rng} takes seeds of {MAX_SEEDS[rng].bit_length()} bits; "
            f"use --rng philox, or a seed from 0 to {MAX_SEEDS[rng]}"
        )


def count_up(seed: int, n: int, rng: str) -> int:
    """Returns the seed `n` images after (below 0: before) `seed`; 0 follows the generator's highest."""
    return (seed + n) % (MAX_SEEDS[rng] + 1)


def counted(job: Job, n: int) -> Job:
    """Returns the job of image `n` of several like this one: its seed counts up, or with a variation that one's."""
    if job.variation_strength:
        return replace(job, variation_seed=count_up(job.variation_seed, n, job.rng))
    return replace(job, seed=count_up(job.seed, n, job.rng))
