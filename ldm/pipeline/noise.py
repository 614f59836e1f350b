"""The streams of noise that a batch of jobs draws from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ldm.job import Job
from ldm.models.diffusion.noise import NoiseSource, RunNoise, noise_source
from ldm.models.diffusion.passes import CONVENTIONS, follows_path
from ldm.models.diffusion.step_noise import SeparateSteps, StartRun, brownian_steps, stream_of_steps
from ldm.seeds import count_up

_PARALLEL = 0.9995  # a cosine


def sampling_noise(jobs: Sequence[Job], device: torch.device, fixed_rows: int | None = None) -> NoiseSource:
    """The noise that a batch is denoised with; see `Pipeline.noise`."""
    source = noise_source(jobs[0].rng, jobs[0].seed_mode, _stream_seeds(jobs), device)
    if jobs[0].seed_mode == "batch":
        return RunNoise(source, fixed_rows)
    steps = _noise_of_steps(jobs, device)
    return source if steps is None else SeparateSteps(source, steps)


def _noise_of_steps(jobs: Sequence[Job], device: torch.device) -> StartRun | None:
    """The noise of a batch's steps; None where it is that of the images' streams."""
    job = jobs[0]
    rng = job.rng if job.step_rng == "auto" else job.step_rng
    if follows_path(job):
        whole = not CONVENTIONS[job.convention].path_over_run
        return brownian_steps(rng, [job.seed for job in jobs], device, whole)
    if rng == job.rng and job.step_seed_delta == 0:
        return None
    return stream_of_steps(rng, [count_up(job.seed, job.step_seed_delta, rng) for job in jobs], device)


def posterior_noise(jobs: Sequence[Job], device: torch.device) -> NoiseSource:
    """The noise that latents of images are drawn with: separate CPU streams, equal ones for every batch of a run.

    So the noise that denoising starts from is the same as in text to image, and devices agree.
    """
    seeds = [int(np.random.SeedSequence([seed, 1]).generate_state(1)[0]) for seed in _stream_seeds(jobs)]
    return noise_source("cpu", jobs[0].seed_mode, seeds, device)


def varied(code: Tensor, jobs: Sequence[Job]) -> Tensor:
    """Start noise [N, C, h, w], each image's turned to that of its variation seed by its strength."""
    strength = jobs[0].variation_strength
    if strength == 0:
        return code
    others = [replace(job, seed=job.variation_seed, seed_mode="image") for job in jobs]
    return turned(code, sampling_noise(others, code.device).draw(code.shape), strength)


def turned(a: Tensor, b: Tensor, share: float) -> Tensor:
    """Noise [N, C, h, w] between `a` (share 0) and `b` (share 1), on a great circle (Shoemake 1985, slerp).

    As in AUTOMATIC1111's web UI each column of the map is a vector of its own, and noise that is nearly the same on
    the whole is mixed on a line, in which `share` counts from the other end.
    """
    cosine = F.cosine_similarity(a, b, dim=2, eps=0)[:, :, None]
    if cosine.mean() > _PARALLEL:
        return share * a + (1 - share) * b
    angle = torch.acos(cosine)
    return (torch.sin((1 - share) * angle) * a + torch.sin(share * angle) * b) / torch.sin(angle)


def start_noise(noise: NoiseSource, shape: Sequence[int]) -> Tensor:
    """The noise [N, C, h, w] that a batch of `shape` starts from."""
    return noise.start(shape) if isinstance(noise, RunNoise) else noise.draw(shape)


def skip_start_noise(noise: NoiseSource, shape: Sequence[int]) -> None:
    """Leaves the stream as `start_noise` would."""
    if isinstance(noise, RunNoise):
        noise.skip_start(shape)
    else:
        noise.skip(shape)


def place_notes(rows: Sequence[int], noise: NoiseSource) -> list[dict[str, str]]:
    """For the metadata: the place of each image of a batch in the stream of its run."""
    places = noise.places(rows) if isinstance(noise, RunNoise) else []
    return [{"Stream": str(place)} for place in places] or [{} for _ in rows]


def _stream_seeds(jobs: Sequence[Job]) -> list[int]:
    """The seeds of a batch's noise streams: one for each image, or one for the run."""
    return [job.seed for job in jobs] if jobs[0].seed_mode == "image" else [jobs[0].seed]
