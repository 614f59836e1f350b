"""Noise or start latents -> latents: the passes of a batch through a sampler, or through its noise alone."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ldm.job import Job
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.guidance import GuidancePlan, ZeroDenoiser
from ldm.models.diffusion.noise import NoiseSource, SkippingNoise
from ldm.models.diffusion.passes import Pass, passes_of, schedule_of, settings_of
from ldm.models.diffusion.sampler import Sampler
from ldm.models.diffusion.solvers import SOLVERS
from ldm.pipeline.conditioning import TextConditioning
from ldm.pipeline.control import ControlNetworks
from ldm.pipeline.image import OnStep, StepInfo
from ldm.pipeline.noise import posterior_noise
from ldm.pipeline.placement import Placement
from ldm.pipeline.start_latents import StartLatents, Starts
from ldm.runtime.shortcuts import shortcuts

logger = logging.getLogger(__name__)


class _Stopped(Exception):
    """Raised after a step at which the callback stops: its estimate is the result."""

    def __init__(self, step: StepInfo) -> None:
        super().__init__(step)
        self.step = step


class LatentSampler:
    """Denoises batches of jobs through all their passes."""

    def __init__(
        self,
        model: LatentDiffusion,
        placement: Placement,
        conditioning: TextConditioning,
        starts: Starts,
        control: ControlNetworks,
    ) -> None:
        self._model, self._placement = model, placement
        self._conditioning, self._starts, self._control = conditioning, starts, control
        self._warned = False

    def sample(
        self,
        jobs: Sequence[Job],
        start: StartLatents | None,
        code: Tensor,
        noise: NoiseSource,
        on_step: OnStep | None,
    ) -> tuple[Tensor, StepInfo | None]:
        """The latents [N, C, h, w] of a batch after its last pass, and the step at which `on_step` stopped it.

        `code` [N, C, h, w] is the start noise; `start` replaces the image that the jobs start from.
        """
        try:
            return self._sample(jobs, start, code, noise, on_step), None
        except _Stopped as stopped:
            return stopped.step.estimate, stopped.step

    def _sample(
        self,
        jobs: Sequence[Job],
        start: StartLatents | None,
        code: Tensor,
        noise: NoiseSource,
        on_step: OnStep | None,
    ) -> Tensor:
        job, posterior = jobs[0], posterior_noise(jobs, self._model.device)
        sampler, latents = _make_sampler(self._model, job), code
        self._warn_of_late_start(sampler)
        for one in passes_of(job, len(sampler.table), None if start is None else False):
            if one.share != sampler.noise_schedule.share:
                sampler = _make_sampler(self._model, job, one.share)
            upscaled = one.start == "upscaled"
            channels = self._starts.channels(jobs, one.size, upscaled, posterior)
            if upscaled:
                start = self._starts.enlarged(jobs, latents)
                code = noise.draw(start.latents.shape)
            elif start is None:
                start = self._starts.latents(jobs, posterior)
            if start is not None and one.steps == 0:
                latents = start.latents
            else:
                plan = self._conditioning.plan(jobs, channels, upscaled)
                with self._control.running(job):
                    plan = replace(plan, units=self._control.units(job, one.size))
                    latents = self._denoise(job, one, sampler, plan, start, code, noise, on_step)
        return latents

    def _warn_of_late_start(self, sampler: Sampler) -> None:
        """Warns once if a model that was trained from noise alone gets no such step."""
        begins, last = sampler.table.timesteps[-1], self._model.num_timesteps - 1
        if self._model.zero_terminal_snr and begins < last and not self._warned:
            self._warned = True
            logger.warning(
                "this model was trained without signal at timestep %d, and the steps begin at %g: its images have "
                "less contrast; use a schedule that begins there, such as trailing", last, begins,
            )  # fmt: skip

    def _denoise(
        self,
        job: Job,
        one: Pass,
        sampler: Sampler,
        plan: GuidancePlan,
        start: StartLatents | None,
        code: Tensor,
        noise: NoiseSource,
        on_step: OnStep | None,
    ) -> Tensor:
        """One pass, from the noise `code`, or from `start` with as much of it as the steps take out."""
        guidance = plan.first
        # only where needed: a replaced method may accept the original's keywords only
        extra: dict[str, Any] = {"plan": plan} if plan.changes else {}
        network = self._model.model.diffusion_model
        with (
            self._placement.running(self._model.model),
            shortcuts(network, job.cache_steps, job.merge_tokens, one.steps) as stepped,
        ):
            return sampler.decode(
                sampler.starting(code)
                if start is None
                else sampler.start_from(start.latents, one.steps, code),
                guidance.cond,
                one.steps,
                unconditional_guidance_scale=guidance.scale,
                guidance_rescale=guidance.rescale,
                unconditional_conditioning=guidance.uncond,
                callback=lambda _: stepped(),
                img_callback=None if on_step is None else partial(_report_step, on_step, one.steps),
                noise=noise,
                mask=None if start is None else start.keep,
                x0=None if start is None else start.latents,
                **extra,
            )

    def skip(self, job: Job, count: int, noise: NoiseSource) -> None:
        """Leaves `noise` as `sample` would for `count` such jobs: the same passes, over no model."""
        sampler = _make_sampler(ZeroDenoiser(self._model.alphas_cumprod), job)
        for one in passes_of(job, len(sampler.table)):
            if one.share != sampler.noise_schedule.share:
                sampler = _make_sampler(ZeroDenoiser(self._model.alphas_cumprod), job, one.share)
            x = torch.zeros(count, *self._latent_shape(*one.size))
            if one.start == "upscaled":
                noise.skip(x.shape)
            masked = one.start == "latents" and self._starts.keeps_masked(job.init)
            keep = torch.ones(1, 1, *x.shape[2:]) if masked else None
            sampler.decode(x, None, one.steps, noise=SkippingNoise(noise), mask=keep, x0=x)

    def latent_shape(self, job: Job) -> tuple[int, int, int]:
        """The shape (C, h, w) of the latents of a job's first pass."""
        return self._latent_shape(job.height, job.width)

    def _latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        factor = self._model.first_stage_model.downsampling
        return self._model.channels, height // factor, width // factor


def _make_sampler(model: LatentDiffusion | ZeroDenoiser, job: Job, share: float = 1.0) -> Sampler:
    """The sampler of a job with its schedule, or a share of it, over a model."""
    sampler = SOLVERS[job.sampler].make(model, schedule_of(job, share), **settings_of(job))
    sampler.make_schedule(job.steps, job.timestep_spacing, verbose=False)
    return sampler


def _report_step(on_step: OnStep, total: int, estimate: Tensor, index: int) -> None:
    step = StepInfo(index, total, estimate)
    if on_step(step) is False:
        raise _Stopped(step)
