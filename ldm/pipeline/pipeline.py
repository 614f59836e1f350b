"""Job -> conditioning -> latents -> pixels: the Python API, and the one place that knows every room."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.checkpoints.adapters.lora import LoraStack
from ldm.checkpoints.adapters.lora_files import lora_file
from ldm.checkpoints.configs import BUNDLED_CKPT
from ldm.checkpoints.layouts.prediction import Choice
from ldm.checkpoints.load import Ema
from ldm.job import Init, Job, batch_key, batches_of
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.noise import NoiseSource, RunNoise, StreamPlace
from ldm.pipeline.batch import BatchMaker
from ldm.pipeline.image import GeneratedImage, OnStep, Pending
from ldm.pipeline.jobs import check_job, numbered, suited
from ldm.pipeline.load import load_pretrained, load_screen
from ldm.pipeline.noise import sampling_noise, start_noise
from ldm.pipeline.placement import Placement
from ldm.pipeline.start_latents import OpenCanvas
from ldm.runtime.device import FULL, Precision, resolve_device
from ldm.runtime.packing import PackedFiles
from ldm.runtime.tiling import Tiling
from ldm.safety.screen import Screen

BATCH_SIZE = 8  # jobs that `Pipeline.make` makes at a time


class Pipeline:
    """A loaded model that makes images from jobs.

    `canvases` opens the images that jobs start from. With `tiles` "on" the autoencoder works in tiles, with "auto"
    where an image would not fit into memory otherwise; the result is then approximate. `find_lora` gives the file
    of a name in `Job.loras`; by default the name is its path. With `lowmem` each network takes memory only while it
    is in use, and the U-Net's weights no more than a share of it; `compiled` leaves the U-Net to torch's compiler.
    """

    def __init__(
        self,
        model: LatentDiffusion,
        precision: Precision = FULL,
        canvases: OpenCanvas | None = None,
        tiles: Tiling = "auto",
        find_lora: Callable[[str], Path] = lora_file,
        lowmem: bool = False,
        compiled: bool = False,
        packed: PackedFiles | None = None,
    ):
        self.model = model
        self.precision = precision
        self.entries: Mapping[str, str] = {}  # metadata of `GeneratedImage.save` besides the job
        self.screen = Screen(None)
        self.loras = LoraStack(model, find_lora)
        self.maker = BatchMaker(model, Placement(model, precision, lowmem, compiled, packed), tiles, canvases)
        self.starts, self.first_stage = self.maker.starts, self.maker.first_stage
        self.control = self.maker.control

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path = BUNDLED_CKPT,
        config: str | Path | None = None,
        device: str = "auto",
        precision: str = "autocast",
        ema: Ema = "auto",
        vae: str | Path | None = None,
        text_encoder: str | Path | None = None,
        safety: bool = True,
        prediction: Choice = "auto",
    ) -> Pipeline:
        """A pipeline of a checkpoint, a file or a folder of diffusers; without one, of the bundled model.

        Its content chooses the config unless one is given, and whether it predicts the noise or v unless `prediction`
        does. Nothing is downloaded. With `safety` the images of `make` are checked if the safety checker's weights
        are on this machine. Raises `InputError` for what cannot be loaded.
        """
        here = resolve_device(device)
        loaded = load_pretrained(path, config, here, precision, ema, vae, text_encoder, prediction)
        pipeline = cls(loaded.model, loaded.precision)
        pipeline.entries = loaded.entries
        if safety:
            pipeline.screen = load_screen(here)
        return pipeline

    def start_over(self, canvases: OpenCanvas, find_lora: Callable[[str], Path]) -> None:
        """Makes the next jobs as if none had been before: no LoRA and no textual inversion stays on the model."""
        self.loras.apply(())
        self.loras = LoraStack(self.model, find_lora)
        self.maker.start_over(canvases)

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self.model.device

    @property
    def factor(self) -> int:
        """How many pixels one latent value spans along each side."""
        return self.first_stage.factor

    @property
    def tile_sides(self) -> dict[tuple[int, int], int | None]:
        """The choice of `tile_side` for each size; one that is put here holds."""
        return self.first_stage.tile_sides

    def tile_side(self, height: int, width: int) -> int | None:
        """The side in latent cells of the tiles for images of a size; None if they are not cut."""
        return self.first_stage.tile_side(height, width)

    # --- noise ------------------------------------------------------------------------------------------------

    def noise(self, jobs: Sequence[Job], fixed_rows: int | None = None) -> NoiseSource:
        """The noise of one batch of jobs; with seed mode "batch", keep the first batch's for the whole run.

        Then `fixed_rows` lets all batches of a size, of at most so many images, start from the same noise.
        """
        return sampling_noise(jobs, self.device, fixed_rows)

    def start_code(self, job: Job, count: int, noise: NoiseSource) -> Tensor:
        """The start noise of a batch of `count` jobs like this one [count, C, h, w], drawn from `noise`."""
        return start_noise(noise, (count, *self._latent_shape(job)))

    def enter(self, job: Job, place: StreamPlace) -> tuple[NoiseSource, Tensor]:
        """The noise of a job's run at the place of its image, and the start noise of that for all of its batch."""
        noise = self.noise([job])
        assert isinstance(noise, RunNoise)
        return noise, noise.enter(place, self._latent_shape(job)).expand(place.size, -1, -1, -1)

    @torch.inference_mode()
    def skip(self, jobs: Sequence[Job], noise: NoiseSource) -> None:
        """Leaves `noise` as `make` with the same arguments would leave it, and makes nothing."""
        self.maker.skip([self.starts.sized(job) for job in jobs], noise)

    def _latent_shape(self, job: Job) -> tuple[int, int, int]:
        return self.maker.sampler.latent_shape(self.starts.sized(job))

    # --- making images ------------------------------------------------------------------------------------------

    def job(self, prompt: str, **fields: Any) -> Job:
        """A job as it would be made: checked, and with its size in pixels."""
        return self._checked(Job(prompt, **fields))

    def __call__(
        self,
        prompts: str | Sequence[str],
        images_per_prompt: int = 1,
        on_step: OnStep | None = None,
        batch_size: int = BATCH_SIZE,
        **fields: Any,
    ) -> list[GeneratedImage]:
        """Images of prompts, with the other fields of `Job`; image i has seed `seed` + i, see `count_up`.

        Their size is by default the model's own, or that of the image to start from.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        texts = [prompt for prompt in prompts for _ in range(images_per_prompt)]
        jobs = [self.job(text, **fields) for text in texts]
        return self.make(numbered(jobs), on_step=on_step, batch_size=batch_size)

    def make(
        self,
        jobs: str | Job | Sequence[str | Job],
        noise: NoiseSource | None = None,
        start_code: Tensor | None = None,
        on_step: OnStep | None = None,
        latents: Tensor | None = None,
        batch_size: int = BATCH_SIZE,
    ) -> list[GeneratedImage]:
        """The images of jobs, or of prompts, in their order: jobs that can share a batch do, up to `batch_size`.

        Each job is checked as the command line checks it, all before the first is made; `InputError` names what
        is wrong. `on_step(StepInfo)` is called after each denoising step, and stops the batch by returning False:
        its images are then those that the model predicted at that step. For jobs of one batch only: `noise` is the
        stream that is drawn from, `start_code` [N, C, h, w] the noise to start with, `latents` [N, C, h, w] what to
        start from at `strength` in place of an image.
        """
        jobs = [jobs] if isinstance(jobs, str | Job) else list(jobs)
        checked = [self._checked(Job(job) if isinstance(job, str) else job) for job in jobs]
        if any(given is not None for given in (noise, start_code, latents)):
            return self._screened(self.begin(checked, noise, start_code, on_step, latents))
        made: dict[int, GeneratedImage] = {}
        for places in batches_of(checked, batch_size):
            batch = [checked[i] for i in places]
            if batch[0].seed_mode == "batch":
                noise = noise or self.noise(batch)
            made |= zip(places, self._screened(self.begin(batch, noise, on_step=on_step)), strict=True)
        return [made[i] for i in range(len(checked))]

    def _screened(self, pending: Sequence[Pending]) -> list[GeneratedImage]:
        """Finished images, blank where the safety check flags them, with the metadata of the model."""
        images = self.finish(pending)
        verdicts = self.screen.screen([image.pixels for image in images])
        return [p.screened(verdict, self.entries) for p, verdict in zip(images, verdicts, strict=True)]

    def _checked(self, job: Job) -> Job:
        """The job as it is made: every field in range, and the size known."""
        job = suited(self.starts.sized(job), self.model)
        size = self.starts.size_of(job) if job.init is not None else None
        check_job(job, size, self.factor, self.model)
        return job

    @torch.inference_mode()
    def begin(
        self,
        jobs: Sequence[Job],
        noise: NoiseSource | None = None,
        start_code: Tensor | None = None,
        on_step: OnStep | None = None,
        latents: Tensor | None = None,
    ) -> list[Pending]:
        """The first part of `make`, for one batch: leaves its work to the device, and waits for none of the images.

        The jobs differ at most in seeds, prompts and how those are used, and are not checked.
        """
        if len(set(map(batch_key, jobs))) != 1:
            raise ValueError(
                "the jobs of one batch may differ in seeds, prompts, guidance scales, rescaling and CLIP skips only"
            )
        if self.loras.apply(jobs[0].loras):
            self.maker.conditioning.clear()
        self.maker.join_edges(jobs[0])
        sized = [self.starts.sized(job) for job in jobs]
        return self.maker.begin(sized, noise, start_code, on_step, latents)

    @torch.inference_mode()
    def finish(self, pending: Iterable[Pending]) -> list[GeneratedImage]:
        """The second part of `make`: waits for the images. Another thread may do it while this one is in `begin`."""
        made = [image.finish(self.first_stage.repaired) for image in pending]
        return [self.starts.larger(image) for image in made]

    def use_upscaler(self, file: str | Path | None) -> None:
        """Enlarges images by the network in a file from now on: before a second pass, or when they are finished."""
        self.starts.use_upscaler(file)

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> np.ndarray:
        """uint8 images [N, H, W, 3] of scaled latents [N, C, h, w], such as a callback's estimate."""
        return self.first_stage.pixels(latents)

    @torch.inference_mode()
    def colours(self, latents: Tensor) -> np.ndarray:
        """uint8 colours [N, h, w, 3] of the cells of scaled latents [N, C, h, w], by a linear map and so at once.

        The map is fitted to this model's decoder at the first call.
        """
        return self.first_stage.colours(latents)

    def small_decoder(self, path: str | Path) -> Callable[[Tensor], np.ndarray]:
        """A function from scaled latents [N, C, h, w] to uint8 images [N, 4 h, 4 w, 3] by the TAESD of a file.

        It runs in the precision of this pipeline. Raises `InputError` for other files.
        """
        return torch.inference_mode()(self.first_stage.small_decoder(path))

    @torch.inference_mode()
    def encode(self, image: Any) -> Tensor:
        """The scaled latents [1, C, h, w] of an image as `Init` takes it: the mean of their distribution."""
        return self.starts.mean_latents(Init(image))
