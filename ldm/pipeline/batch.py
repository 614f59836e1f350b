"""One batch of jobs -> images that the device is at work on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor

from ldm.job import Job
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.noise import NoiseSource
from ldm.pipeline.conditioning import TextConditioning
from ldm.pipeline.control import ControlNetworks
from ldm.pipeline.first_stage import FirstStage
from ldm.pipeline.image import OnStep, Pending, StepInfo
from ldm.pipeline.noise import place_notes, sampling_noise, skip_start_noise, start_noise, varied
from ldm.pipeline.placement import Placement
from ldm.pipeline.sampling import LatentSampler
from ldm.pipeline.start_latents import OpenCanvas, StartLatents, Starts
from ldm.runtime.seamless import Seamless
from ldm.runtime.tiling import Tiling


class BatchMaker:
    """The parts of a pipeline, and the way of a batch through them. `tiles` and `canvases` are as in `Pipeline`."""

    def __init__(
        self, model: LatentDiffusion, placement: Placement, tiles: Tiling, canvases: OpenCanvas | None
    ) -> None:
        self.placement, self._model, self._seamless = placement, model, Seamless()
        self.conditioning = TextConditioning(model, placement)
        self.first_stage = FirstStage(model, placement, tiles)
        self.starts = Starts(model, self.first_stage, canvases)
        self.control = ControlNetworks(model, placement, lambda init: self.starts.canvas(init))
        self.sampler = LatentSampler(model, placement, self.conditioning, self.starts, self.control)

    def join_edges(self, job: Job) -> None:
        """Has all networks that see pixels wrap around as a job wants it."""
        networks = (
            self._model.model.diffusion_model,
            self._model.first_stage_model,
            *self.control.networks(job),
        )
        self._seamless.apply(networks, job.seamless)

    def start_over(self, canvases: OpenCanvas) -> None:
        """Forgets everything of the jobs before."""
        self.conditioning.remove_embeddings()
        self.first_stage.clear()
        self.starts.clear(canvases)
        self.control.clear()

    def begin(
        self,
        jobs: Sequence[Job],
        noise: NoiseSource | None,
        start_code: Tensor | None,
        on_step: OnStep | None,
        latents: Tensor | None,
    ) -> list[Pending]:
        """Begins a batch of jobs whose sizes are known; the rest is as in `Pipeline.begin`."""
        source = self._noise(jobs) if noise is None else noise
        code = self._start_noise(jobs, source) if start_code is None else start_code
        groups = self.conditioning.by_length(jobs)
        made: dict[int, Pending] = {}
        for places in groups:
            alike = [jobs[i] for i in places]
            start = code[places] if len(groups) > 1 else code
            if len(groups) > 1 and jobs[0].seed_mode == "image":  # each image has a stream of its own
                source = self._noise(alike)
                if start_code is None:
                    start = self._start_noise(alike, source)
            last = len(made) + len(places) == len(jobs)  # the steps are counted once
            given = None if latents is None else StartLatents(latents[places].to(self.placement.device))
            pending = self._begin_alike(alike, places, source, start, on_step if last else None, given)
            made |= zip(places, pending, strict=True)
        return [made[i] for i in range(len(jobs))]

    def _begin_alike(
        self,
        jobs: Sequence[Job],
        rows: Sequence[int],
        noise: NoiseSource,
        code: Tensor,
        on_step: OnStep | None,
        start: StartLatents | None,
    ) -> list[Pending]:
        """`begin` for prompts of one length, which have these rows in the start noise of their batch."""
        places = place_notes(rows, noise)
        told = None if on_step is None else partial(_with_rows, on_step, rows)
        latents, stop = self.sampler.sample(jobs, start, code, noise, told)
        stopped = {} if stop is None else {"Stopped": f"after step {stop.index + 1} of {stop.total}"}
        pasted = [self.starts.paste(job) for job in jobs]
        return [
            Pending(job, z[None], self.first_stage.decode(z[None]), self._notes(job) | place | stopped, paste)
            for job, z, place, paste in zip(jobs, latents, places, pasted, strict=True)
        ]

    def skip(self, jobs: Sequence[Job], noise: NoiseSource) -> None:
        """Leaves `noise` as `begin` would leave it for a batch of jobs whose sizes are known."""
        skip_start_noise(noise, (len(jobs), *self.sampler.latent_shape(jobs[0])))
        for places in self.conditioning.by_length(jobs):
            self.sampler.skip(jobs[0], len(places), noise)

    def _noise(self, jobs: Sequence[Job]) -> NoiseSource:
        return sampling_noise(jobs, self.placement.device)

    def _start_noise(self, jobs: Sequence[Job], noise: NoiseSource) -> Tensor:
        return varied(start_noise(noise, (len(jobs), *self.sampler.latent_shape(jobs[0]))), jobs)

    def _notes(self, job: Job) -> dict[str, str]:
        """Metadata of an image besides the job."""
        sizes = {(job.height, job.width), job.upscaled_size}
        tiled = any(self.first_stage.tile_side(*size) for size in sizes)
        found = (
            ("Prompt cut", self.conditioning.cut_words(job)),
            ("Tiles", "approximate" if tiled else ""),
            ("Inpaint area", "" if job.init is None or job.init.crop_to_mask is None else "Only masked"),
        )
        return {name: note for name, note in found if note}


def _with_rows(on_step: OnStep, rows: Sequence[int], step: StepInfo) -> object:
    return on_step(replace(step, rows=rows))
