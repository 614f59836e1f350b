"""Job -> conditioning -> latents -> pixels: the Python API, and the one place that knows every room."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ldm import __version__
from ldm.checkpoints.adapters.lora import LoraStack
from ldm.checkpoints.adapters.lora_files import lora_file
from ldm.checkpoints.cache import cached_file, read_cached, write_cached
from ldm.checkpoints.configs import BUNDLED_CKPT, config_for
from ldm.checkpoints.formats.read import Checkpoint
from ldm.checkpoints.formats.tensor_bytes import forget
from ldm.checkpoints.hashing import file_sha256
from ldm.checkpoints.load import Ema, build_model, check_fit, load_into, use_vocabulary
from ldm.checkpoints.model_files import model_files, read_model
from ldm.config import read_config
from ldm.fields import check_fields, count_up
from ldm.images.canvas import Canvas, open_canvas
from ldm.images.mask import fade, hide, paste, to_latent_mask
from ldm.images.pixels import finite, from_uint8, to_uint8
from ldm.images.resample import enlarge_latents, enlarge_pixels
from ldm.job import Init, Job, batch_key, batches_of
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.ddpm import LatentDiffusion, LatentInpaintDiffusion
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.guidance import Conditioning
from ldm.models.diffusion.noise import NoiseSource, RunNoise, StreamPlace, noise_source
from ldm.models.diffusion.plms import PLMSSampler
from ldm.models.diffusion.sampler import Sampler
from ldm.models.diffusion.schedule import check_sampling, steps_to_run
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.encoders.modules import FrozenCLIPEmbedder
from ldm.places import find
from ldm.prompts.conditioning import count_chunks, encode_weighted
from ldm.runtime.device import FULL, Precision, resolve_device, resolve_precision, widened
from ldm.runtime.fast import halved, prepare
from ldm.runtime.tiling import (
    Tiling,
    available_memory,
    choose_tile,
    decode_in_tiles,
    encode_in_tiles,
)
from ldm.safety.load import find_safety_model, load_safety_model
from ldm.safety.screen import Screen
from ldm.util import InputError

if TYPE_CHECKING:
    from PIL import Image

logger = logging.getLogger(__name__)

BATCH_SIZE = 8  # jobs that `Pipeline.make` makes at a time
LOW_MEMORY = 300_000_000  # bytes of weights that stay in memory where little is wanted
SAMPLERS: Mapping[str, type[Sampler]] = {
    "ddim": DDIMSampler, "plms": PLMSSampler, "dpm_solver": DPMSolverSampler,
}  # fmt: skip


def load_model(
    config: Mapping[str, Any],
    ckpt: str | Path,
    device: torch.device | str = "cpu",
    ema: Ema = "auto",
    mmap: bool = True,
    vae: str | Path | None = None,
    text_encoder: str | Path | None = None,
    dtype: torch.dtype | None = torch.float32,
    cache: Path | None = None,
) -> LatentDiffusion:
    """The model of a checked config with the weights of a checkpoint in `dtype` (None: the file's), ready to sample.

    `ckpt` is a file or a folder of diffusers, `vae` and `text_encoder` files or folders with another part. The
    model is built without memory of its own and takes the checkpoint's tensors; see `ldm.checkpoints` for what
    is refused. In the folder `cache` the weights are kept as a CPU runs them in bf16, for the next time.
    """
    model = build_model(config)
    checkpoint = read_model(ckpt, mmap, vae, text_encoder)
    check_fit(model, checkpoint)
    if cache is not None:
        files = [file for path in (ckpt, vae, text_encoder) if path is not None for file in model_files(path)]
        checkpoint, ema = _from_cache(cached_file(cache, files, ema), model, checkpoint, ema, mmap)
    load_into(model, checkpoint, dtype, ema)
    use_vocabulary(model, checkpoint.vocabulary)
    if model.use_ema:  # sampling needs one set of weights, and `load_into` has chosen it
        model.use_ema = False
        del model.model_ema
    return model.eval().to(device)


def _from_cache(
    path: Path, model: LatentDiffusion, checkpoint: Checkpoint, ema: Ema, mmap: bool
) -> tuple[Checkpoint, Ema]:
    """What to load in place of `checkpoint`: the cached weights at `path`, which are made if they are missing."""
    own = {key: value.shape for key, value in model.state_dict().items() if not key.startswith("model_ema.")}
    cached = read_cached(path, checkpoint, own, mmap)
    if cached is None:
        load_into(model, checkpoint, None, ema)
        weights = {key: value for key, value in model.state_dict().items() if key in own}
        halves = halved(model)
        types = {key: torch.bfloat16 if key in halves else value.dtype for key, value in weights.items()}
        write_cached(path, weights, types)
        cached = read_cached(path, checkpoint, own, mmap)
    return (checkpoint, ema) if cached is None else (cached, "off")


@dataclass(frozen=True)
class Picture:
    """What became of a job: uint8 pixels [H, W, 3], or None if they were not finite, and notes for the record.

    `kept`, bool [H, W], is True where the pixels are those of the image that the job started from; `latent`
    [C, h, w] is what was decoded, scaled as the U-Net sees it.
    """

    job: Job
    pixels: np.ndarray | None
    notes: Mapping[str, str]
    kept: np.ndarray | None = None
    latent: Tensor | None = None

    @property
    def image(self) -> Image.Image:
        """The image for PIL. Raises ValueError if its pixels were not finite."""
        from PIL import Image

        if self.pixels is None:
            raise ValueError(f"the model gave no finite image for seed {self.job.seed}; try float32")
        return Image.fromarray(self.pixels)

    def save(self, path: str | Path, watermark: bool = True, overwrite: bool = False) -> Path:
        """Writes a PNG file as the scripts do: whole or not at all, with the settings that make it again.

        Pixels are marked with the invisible watermark, except those that the user's own image keeps. Raises
        FileExistsError if `path` exists and `overwrite` is off, ValueError if the pixels were not finite.
        """
        from ldm.images.watermark import Watermark
        from ldm.images.writer import encode_png, publish
        from ldm.metadata.infotext import infotext
        from ldm.metadata.record import record

        pixels = np.asarray(self.image)
        if watermark:
            marked = Watermark().mark(pixels)
            if self.kept is not None:
                marked[self.kept] = pixels[self.kept]
            pixels = marked
        notes = self.notes if watermark else {**self.notes, "Watermark": "off"}
        data = encode_png(pixels, infotext(self.job, notes), record=record(self.job, notes))
        publish(Path(path), data, overwrite)
        return Path(path)


@dataclass(frozen=True)
class StepInfo:
    """A finished denoising step, for a callback: number `index` of `total`, counted from 0.

    `estimate` [N, C, h, w] are the clean latents as the model sees them now; `Pipeline.decode` shows them.
    """

    index: int
    total: int
    estimate: Tensor


OnStep = Callable[[StepInfo], object]  # one that returns False stops there


class _Stopped(Exception):
    """A callback's wish to stop behind a step: what is denoised then is its estimate."""

    def __init__(self, step: StepInfo) -> None:
        super().__init__(step)
        self.step = step


@dataclass(frozen=True)
class Frame:
    """What a picture keeps of the one that it started from: its own pixels wherever `weight` is 0.

    `original` is [1, 3, H, W] in [-1, 1], `weight` [1, 1, H, W], `pixels` uint8 [H, W, 3].
    """

    original: Tensor
    weight: Tensor
    pixels: np.ndarray


@dataclass(frozen=True)
class Pending:
    """A picture that the device may still be at work on: its latent [1, C, h, w], and that decoded [1, 3, H, W]."""

    job: Job
    latent: Tensor
    decoded: Tensor
    notes: Mapping[str, str]
    frame: Frame | None


@dataclass(frozen=True)
class Origin:
    """What a batch starts from other than noise: latents [N, C, h, w]; `keep` [1, 1, h, w] is 1 where they stay."""

    latents: Tensor
    keep: Tensor | None = None


class _Silent:
    """What a sampler needs of a model, which predicts no noise at all."""

    def __init__(self, model: LatentDiffusion) -> None:
        self.alphas_cumprod, self.num_timesteps = model.alphas_cumprod, model.num_timesteps

    def apply_model(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return torch.zeros_like(x)


class _Passed:
    """A stream of noise whose numbers are passed over."""

    def __init__(self, noise: NoiseSource) -> None:
        self.skip = noise.skip

    def draw(self, shape: Sequence[int]) -> Tensor:
        self.skip(shape)
        return torch.zeros(tuple(shape))


class Pipeline:
    """A loaded model that makes pictures from jobs.

    `canvases` opens the pictures that jobs start from. `tiles` says whether the autoencoder works piece by
    piece: "auto" does where a picture would not fit into memory otherwise; the result is then approximate.
    `find_lora` gives the file of a name in `Job.loras`; by default the name is its path. With `lowmem` each network
    takes memory only while it is in use, and the U-Net's weights no more than a share of it; `compiled` leaves the
    U-Net to torch's compiler.
    """

    def __init__(
        self,
        model: LatentDiffusion,
        precision: Precision = FULL,
        canvases: Callable[[Init], Canvas] | None = None,
        tiles: Tiling = "auto",
        find_lora: Callable[[str], Path] = lora_file,
        lowmem: bool = False,
        compiled: bool = False,
    ):
        self.model = model
        self.precision = precision
        self.tiles: Tiling = tiles
        self._lowmem = lowmem
        self.entries: Mapping[str, str] = {}  # what the files of `Picture.save` say besides the job
        self.screen = Screen(None)
        self._one_thread = threading.Lock()  # for the autoencoder
        self._packer = prepare(model, precision.dtype, forget, LOW_MEMORY if lowmem else None, compiled)
        self._clear(lru_cache(maxsize=8)(open_canvas) if canvases is None else canvases, find_lora)

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
    ) -> Pipeline:
        """A pipeline of a checkpoint, a file or a folder of diffusers; without one, of the bundled model.

        Its content chooses the config unless one is given. Nothing is downloaded. With `safety` the images of
        `make` are checked if the safety checker's weights are on this machine. Raises `InputError` for what cannot
        be loaded.
        """
        ckpt, here = find(path), resolve_device(device)
        chosen = config or config_for(read_model(ckpt).state_dict)
        held = resolve_precision(precision, here)
        model = load_model(read_config(find(chosen)), ckpt, here, ema, True, vae, text_encoder, None)
        pipeline = cls(model, held)
        pipeline.entries = {
            "Model hash": file_sha256(ckpt)[:10] if ckpt.is_file() else "",
            "Model": ckpt.stem if ckpt.is_file() and ckpt.stem != "model" else ckpt.absolute().parent.name,
            "Config": Path(chosen).stem,
            "Precision": held.name,
            "Version": f"ldm {__version__}",
        }
        checker = find_safety_model() if safety else None
        if checker is not None:
            flag = load_safety_model(checker, here)
            pipeline.screen = Screen(flag, flag.side)
        return pipeline

    def start_over(self, canvases: Callable[[Init], Canvas], find_lora: Callable[[str], Path]) -> None:
        """Makes the next jobs as if none had been before: no LoRA and no textual inversion stays on the model."""
        self.loras.apply(())
        if isinstance(self.model.cond_stage_model, FrozenCLIPEmbedder):
            self.model.cond_stage_model.use_embeddings({})
        self._clear(canvases, find_lora)

    def _clear(self, canvases: Callable[[Init], Canvas], find_lora: Callable[[str], Path]) -> None:
        """What jobs leave behind, empty."""
        self.canvas = canvases
        self.loras = LoraStack(self.model, find_lora)
        self._encode_prompt = lru_cache(maxsize=64)(self._encode_one)
        # few, as a rule one for the whole run: apart, so that many prompts do not push it out
        self._encode_negative = lru_cache(maxsize=8)(self._encode_one)
        self._distribution = lru_cache(maxsize=4)(self._encode_canvas)
        self._hidden_all = lru_cache(maxsize=4)(self._encode_grey)
        self._weight = lru_cache(maxsize=4)(lambda init: fade(self._repaint(init), init.mask_blur))
        self.tile_sides: dict[tuple[int, int], int | None] = {}  # what `tile_side` has chosen

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return self.model.device

    @property
    def factor(self) -> int:
        """How many pixels one latent value spans along each side."""
        return self.model.first_stage_model.downsampling

    def noise(self, jobs: Sequence[Job], fixed_rows: int | None = None) -> NoiseSource:
        """The noise of one batch of jobs; with seed mode "batch", keep the first batch's for the whole run.

        Then `fixed_rows` lets all batches of a size, of at most so many images, start from the same noise.
        """
        source = noise_source(jobs[0].rng, jobs[0].seed_mode, _stream_seeds(jobs), self.device)
        return source if jobs[0].seed_mode == "image" else RunNoise(source, fixed_rows)

    def _posterior_noise(self, jobs: Sequence[Job]) -> NoiseSource:
        """What latents are drawn with: CPU streams of their own, and equal ones for every batch of a run.

        So the noise that denoising starts from stays the one of text to image, and devices agree.
        """
        seeds = [int(np.random.SeedSequence([seed, 1]).generate_state(1)[0]) for seed in _stream_seeds(jobs)]
        return noise_source("cpu", jobs[0].seed_mode, seeds, self.device)

    def start_code(self, job: Job, count: int, noise: NoiseSource) -> Tensor:
        """The start noise of a batch of `count` jobs like this one [count, C, h, w], drawn from `noise`."""
        shape = (count, *self._latent_shape(job))
        return noise.start(shape) if isinstance(noise, RunNoise) else noise.draw(shape)

    def enter(self, job: Job, place: StreamPlace) -> tuple[NoiseSource, Tensor]:
        """The noise of a job's run at the place of its image, and the start noise of that for all of its batch."""
        noise = self.noise([job])
        assert isinstance(noise, RunNoise)
        return noise, noise.enter(place, self._latent_shape(job)).expand(place.size, -1, -1, -1)

    def _latent_shape(self, job: Job) -> tuple[int, int, int]:
        job = self._sized(job)
        return self.model.channels, job.height // self.factor, job.width // self.factor

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
    ) -> list[Picture]:
        """Images of prompts, with the other fields of `Job`; image i has seed `seed` + i, see `count_up`.

        Their size is by default the model's own, or that of the image to start from.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        texts = [prompt for prompt in prompts for _ in range(images_per_prompt)]
        jobs = [self.job(text, **fields) for text in texts]
        if jobs and jobs[0].seed_mode == "image":
            jobs = [replace(job, seed=count_up(job.seed, i, job.rng)) for i, job in enumerate(jobs)]
        else:
            jobs = [replace(job, batch_index=i) for i, job in enumerate(jobs)]
        return self.make(jobs, on_step=on_step, batch_size=batch_size)

    def make(
        self,
        jobs: str | Job | Sequence[str | Job],
        noise: NoiseSource | None = None,
        start_code: Tensor | None = None,
        on_step: OnStep | None = None,
        latents: Tensor | None = None,
        batch_size: int = BATCH_SIZE,
    ) -> list[Picture]:
        """The images of jobs, or of prompts, in their order: jobs that can share a batch do, up to `batch_size`.

        Each job is checked as the command line checks it, all before the first is made; `InputError` names what
        is wrong. `on_step(StepInfo)` is called after each denoising step, and stops the batch by returning False:
        its images are then those that the model saw coming. For jobs of one batch only: `noise` is the stream
        that is drawn from, `start_code` [N, C, h, w] the noise to start with, `latents` [N, C, h, w] what to
        start from at `strength` in place of an image.
        """
        jobs = [jobs] if isinstance(jobs, str | Job) else list(jobs)
        checked = [self._checked(Job(job) if isinstance(job, str) else job) for job in jobs]
        if any(given is not None for given in (noise, start_code, latents)):
            return self._screened(self.begin(checked, noise, start_code, on_step, latents))
        made: dict[int, Picture] = {}
        for places in batches_of(checked, batch_size):
            batch = [checked[i] for i in places]
            if batch[0].seed_mode == "batch":
                noise = noise or self.noise(batch)
            made |= zip(places, self._screened(self.begin(batch, noise, on_step=on_step)), strict=True)
        return [made[i] for i in range(len(checked))]

    def _screened(self, pending: Sequence[Pending]) -> list[Picture]:
        """Finished images: blank where the safety check flags them, and with what their files say of the model."""
        pictures = self.finish(pending)
        verdicts = self.screen.screen([picture.pixels for picture in pictures])
        return [
            replace(p, pixels=v.pixels, notes={**self.entries, **p.notes, "Safety": v.word})
            for p, v in zip(pictures, verdicts, strict=True)
        ]

    def _checked(self, job: Job) -> Job:
        """The job as it is made: every field in range, and the size known."""
        job = self._sized(job)
        if job.init is not None and (job.height, job.width) != (own := self._own_size(job)):
            raise InputError(
                f"the size is {job.width}x{job.height}, but the image to start from becomes {own[1]}x{own[0]}; "
                "leave width and height of the job out, or give those of its Init with resize"
            )
        check_fields(job)
        check_sampling(job.sampler, job.steps, job.timestep_spacing, job.eta)
        if job.height % self.factor or job.width % self.factor:
            raise InputError(f"{job.width}x{job.height} is not a multiple of {self.factor} pixels")
        return job

    def _own_size(self, job: Job) -> tuple[int, int]:
        """Height and width of the image that a job starts from, or else those that the model was trained at."""
        if job.init is None:
            side = self.model.image_size * self.factor
            return side, side
        height, width, _ = self.canvas(job.init).pixels.shape
        return height, width

    def _sized(self, job: Job) -> Job:
        """The job with a size in pixels: its own where a side is 0."""
        if job.height and job.width:
            return job
        height, width = self._own_size(job)
        return replace(job, height=job.height or height, width=job.width or width)

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

        The jobs differ at most in prompts, guidance scales and seeds, and are not checked.
        """
        if len(set(map(batch_key, jobs))) != 1:
            raise ValueError("the jobs of one batch may differ in prompts, guidance scales and seeds only")
        jobs = [self._sized(job) for job in jobs]
        job = jobs[0]
        if self.loras.apply(job.loras):
            self._encode_prompt.cache_clear()
            self._encode_negative.cache_clear()
        source = self.noise(jobs) if noise is None else noise
        code = self.start_code(job, len(jobs), source) if start_code is None else start_code
        groups = self._by_length(jobs)
        made: dict[int, Pending] = {}
        for places in groups:
            alike = [jobs[i] for i in places]
            if len(groups) > 1 and job.seed_mode == "image":  # each image has a stream of its own
                source = self.noise(alike)
                start = self.start_code(job, len(alike), source) if start_code is None else code[places]
            else:
                start = code[places] if len(groups) > 1 else code
            last = len(made) + len(places) == len(jobs)  # the steps are counted once
            made |= zip(
                places,
                self._begin_alike(
                    alike,
                    places,
                    source,
                    start,
                    on_step if last else None,
                    None if latents is None else Origin(latents[places].to(self.device)),
                ),
                strict=True,
            )
        return [made[i] for i in range(len(jobs))]

    def _by_length(self, jobs: Sequence[Job]) -> list[list[int]]:
        """The jobs of a batch by their places: prompts that are read in as many chunks are made together."""
        groups: dict[int | None, list[int]] = {}
        for place, length in enumerate(map(self._count_chunks, jobs)):
            groups.setdefault(length, []).append(place)
        return list(groups.values())

    def _begin_alike(
        self,
        jobs: Sequence[Job],
        rows: Sequence[int],
        noise: NoiseSource,
        code: Tensor,
        on_step: OnStep | None,
        origin: Origin | None,
    ) -> list[Pending]:
        """`begin` for prompts of one length, which have these rows in the start noise of their batch."""
        places, stopped = _place_notes(rows, noise), {}
        try:
            latents = self._denoise_passes(jobs, origin, code, noise, on_step)
        except _Stopped as stop:
            latents = stop.step.estimate
            stopped = {"Stopped": f"after step {stop.step.index + 1} of {stop.step.total}"}
        return [
            Pending(job, latent[None], self._decode(latent[None]), self._notes(job) | place | stopped, frame)
            for job, latent, place, frame in zip(
                jobs, latents, places, [self._frame(job) for job in jobs], strict=True
            )
        ]

    def _denoise_passes(
        self,
        jobs: Sequence[Job],
        origin: Origin | None,
        code: Tensor,
        noise: NoiseSource,
        on_step: OnStep | None,
    ) -> Tensor:
        """The latents [N, C, h, w] of a batch after its first pass and, with `upscale`, its second."""
        job, posterior = jobs[0], self._posterior_noise(jobs)
        hidden = self._hidden(jobs, job.init, (job.height, job.width), posterior)
        origin = self._origin(jobs, posterior) if origin is None else origin
        latents = self._denoise(jobs, origin, job.strength, code, hidden, noise, on_step)
        if job.upscale > 1:
            origin = self._enlarged(jobs, latents)
            code = noise.draw(origin.latents.shape)
            hidden = self._hidden(jobs, None, job.upscaled_size, posterior)
            latents = self._denoise(jobs, origin, job.upscale_strength, code, hidden, noise, on_step)
        return latents

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> np.ndarray:
        """uint8 images [N, H, W, 3] of scaled latents [N, C, h, w], such as a callback's estimate."""
        return np.concatenate([to_uint8(self._rescue(z, self._decode(z))[0]) for z in latents.split(1)])

    @torch.inference_mode()
    def encode(self, image: Any) -> Tensor:
        """The scaled latents [1, C, h, w] of an image as `Init` takes it: the mean of their distribution."""
        return self.model.get_first_stage_encoding(self._distribution(Init(image), False).mode())

    @torch.inference_mode()
    def finish(self, pending: Iterable[Pending]) -> list[Picture]:
        """The second part of `make`: waits for the pictures. Another thread may do it, beside `begin`."""
        return [self._picture(picture) for picture in pending]

    @torch.inference_mode()
    def skip(self, jobs: Sequence[Job], noise: NoiseSource) -> None:
        """Leaves `noise` as `make` with the same arguments would leave it, and makes nothing."""
        job, passed = self._sized(jobs[0]), _Passed(noise)
        shape = (len(jobs), *self._latent_shape(job))
        if isinstance(noise, RunNoise):
            noise.skip_start(shape)
        else:
            noise.skip(shape)
        for places in self._by_length(jobs):
            count = len(places)
            self._skip_steps(job, count, (job.height, job.width), job.init, job.strength, passed)
            if job.upscale > 1:
                height, width = job.upscaled_size
                noise.skip((count, *self._latent_shape(replace(job, height=height, width=width))))
                self._skip_steps(job, count, (height, width), None, job.upscale_strength, passed, again=True)

    def _skip_steps(
        self,
        job: Job,
        count: int,
        size: tuple[int, int],
        init: Init | None,
        strength: float,
        noise: NoiseSource,
        again: bool = False,
    ) -> None:
        """What `_denoise` draws for a batch of `count` jobs: the same loop over a model that says nothing."""
        sampler = SAMPLERS[job.sampler](_Silent(self.model))
        sampler.make_schedule(job.steps, job.timestep_spacing, job.eta, verbose=False)
        from_noise = init is None and not again
        steps = steps_to_run(1.0 if from_noise else strength, job.steps, len(sampler.table))
        masked = init is not None and self.canvas(init).repaint is not None
        masked = masked and not isinstance(self.model, LatentInpaintDiffusion)
        x = torch.zeros(count, self.model.channels, size[0] // self.factor, size[1] // self.factor)
        if steps or from_noise:
            mask, x0 = (torch.ones(1, 1, *x.shape[2:]), x) if masked else (None, None)
            sampler.decode(x, None, steps, noise=noise, mask=mask, x0=x0)

    @contextmanager
    def _using(self, network: nn.Module) -> Iterator[None]:
        """Within it one network runs in this pipeline's precision."""
        with self._at_hand(network), self.precision.context(self.device):
            yield

    @contextmanager
    def _at_hand(self, network: nn.Module) -> Iterator[None]:
        """Within it a network can run; behind it its memory is free with `lowmem`."""
        if self._lowmem and self._packer is None:
            network.to(self.device)
        yield
        if self._lowmem:
            self._release(network)

    def _release(self, network: nn.Module) -> None:
        if self._packer is None:
            network.to("cpu")
        else:
            self._packer.drop(network)

    # --- conditioning ---------------------------------------------------------------------------------------

    def _encode_one(self, prompt: str, chunks: int | None) -> Tensor:
        """What a prompt says [1, L, width]: as it is, or with weights and in so many chunks of 75 tokens."""
        if chunks is None:
            return self.model.get_learned_conditioning([prompt])
        return encode_weighted(self.model.cond_stage_model, [prompt], chunks)

    def _count_chunks(self, job: Job) -> int | None:
        """In how many chunks the prompts of a job are read, both in as many; None where they are read plainly."""
        if job.prompt_syntax == "plain":
            return None
        return count_chunks(self.model.cond_stage_model, [job.prompt, job.negative_prompt])

    def _condition(self, encoded: Sequence[Tensor], hidden: tuple[Tensor, Tensor] | None) -> Conditioning:
        context = torch.cat(list(encoded))
        if hidden is None:
            return context
        assert isinstance(self.model, LatentInpaintDiffusion)
        return self.model.hybrid_conditioning(
            context, *(part.expand(len(context), -1, -1, -1) for part in hidden)
        )

    def _hidden(
        self, jobs: Sequence[Job], init: Init | None, size: tuple[int, int], posterior: NoiseSource
    ) -> tuple[Tensor, Tensor] | None:
        """For an inpainting model: its mask [1, 1, h, w], 1 is repainted, and the latents of what it may see.

        Without a picture or a mask it may see nothing, and is a model like any other.
        """
        if not isinstance(self.model, LatentInpaintDiffusion):
            return None
        if init is None or self.canvas(init).repaint is None:
            repaint = torch.ones(1, 1, *size, device=self.device)
            distribution = self._hidden_all(*size)
        else:
            repaint, distribution = self._repaint(init), self._distribution(init, True)
        return to_latent_mask(repaint, self.factor, nearest=True), self._draw(distribution, jobs, posterior)

    # --- the pictures that jobs start from --------------------------------------------------------------------

    def _original(self, init: Init) -> Tensor:
        """The canvas as a float picture [1, 3, H, W] in [-1, 1]."""
        return from_uint8(self.canvas(init).pixels[None]).to(self.device)

    def _repaint(self, init: Init) -> Tensor:
        """The canvas's mask [1, 1, H, W], 1 where it is repainted."""
        return torch.from_numpy(self.canvas(init).repaint).to(self.device)[None, None].float()

    def _encode_canvas(self, init: Init, hide_mask: bool) -> DiagonalGaussianDistribution:
        picture = self._original(init)
        return self._encode(hide(picture, self._repaint(init)) if hide_mask else picture)

    def _draw(
        self, distribution: DiagonalGaussianDistribution, jobs: Sequence[Job], posterior: NoiseSource
    ) -> Tensor:
        """Scaled latents [N, C, h, w], one for each job, by its `posterior`."""
        shape = (len(jobs), *distribution.mean.shape[1:])
        if jobs[0].posterior == "mean":
            return self.model.get_first_stage_encoding(distribution.mode().expand(shape))
        return self.model.get_first_stage_encoding(distribution, posterior.draw(shape))

    def _encode_grey(self, height: int, width: int) -> DiagonalGaussianDistribution:
        """What an inpainting model sees of a picture that is hidden as a whole."""
        return self._encode(torch.zeros(1, 3, height, width, device=self.device))

    def _origin(self, jobs: Sequence[Job], posterior: NoiseSource) -> Origin | None:
        init = jobs[0].init
        if init is None:
            return None
        latents = self._draw(self._distribution(init, False), jobs, posterior)
        if self.canvas(init).repaint is None or isinstance(self.model, LatentInpaintDiffusion):
            return Origin(latents)
        return Origin(latents, 1 - to_latent_mask(self._repaint(init), self.factor, nearest=False))

    def _enlarged(self, jobs: Sequence[Job], latents: Tensor) -> Origin:
        height, width = jobs[0].upscaled_size
        if jobs[0].upscale_in == "latents":
            return Origin(enlarge_latents(latents, height // self.factor, width // self.factor))
        pictures = [self._rescue(z, self._decode(z))[0].float() for z in latents.split(1)]
        encoded = [self._encode(enlarge_pixels(picture, height, width)).mode() for picture in pictures]
        return Origin(self.model.get_first_stage_encoding(torch.cat(encoded)))

    # --- latents ----------------------------------------------------------------------------------------------

    def _denoise(
        self,
        jobs: Sequence[Job],
        origin: Origin | None,
        strength: float,
        code: Tensor,
        hidden: tuple[Tensor, Tensor] | None,
        noise: NoiseSource,
        on_step: OnStep | None,
    ) -> Tensor:
        """Latents [N, C, h, w] from the noise `code`, or from `origin` at `strength`."""
        job = jobs[0]
        sampler = SAMPLERS[job.sampler](self.model)
        sampler.make_schedule(job.steps, job.timestep_spacing, job.eta, verbose=False)
        count = steps_to_run(1.0 if origin is None else strength, job.steps, len(sampler.table))
        if origin is not None and count == 0:
            return origin.latents
        with self._using(self.model.cond_stage_model):
            chunks = self._count_chunks(job)
            cond = self._condition([self._encode_prompt(job.prompt, chunks) for job in jobs], hidden)
            guided = any(job.scale != 1.0 for job in jobs)
            negative = [self._encode_negative(job.negative_prompt, chunks) for job in jobs] if guided else []
            uncond = self._condition(negative, hidden) if guided else None
        with self._using(self.model.model):
            return sampler.decode(
                code if origin is None else sampler.start_from(origin.latents, count, code),
                cond,
                count,
                unconditional_guidance_scale=self._scales(jobs),
                unconditional_conditioning=uncond,
                img_callback=None if on_step is None else partial(_report_step, on_step, count),
                noise=noise,
                mask=None if origin is None else origin.keep,
                x0=None if origin is None else origin.latents,
            )

    def _scales(self, jobs: Sequence[Job]) -> float | Tensor:
        """The guidance scale of a batch, or where its jobs differ those of each [N, 1, 1, 1]."""
        scales = [job.scale for job in jobs]
        if len(set(scales)) == 1:
            return scales[0]
        return torch.tensor(scales, device=self.device)[:, None, None, None]

    # --- pixels -----------------------------------------------------------------------------------------------

    def _frame(self, job: Job) -> Frame | None:
        init = job.init
        if init is None or self.canvas(init).repaint is None or not job.paste or job.upscale > 1:
            return None
        return Frame(self._original(init), self._weight(init), self.canvas(init).pixels)

    def _picture(self, pending: Pending) -> Picture:
        """Puts what is kept of the job's own picture back."""
        job, notes, frame = pending.job, pending.notes, pending.frame
        decoded, overflowed = self._rescue(pending.latent, pending.decoded)
        if overflowed:
            notes = {**notes, "Decoded in": "float32"}
        if not finite(decoded)[0]:
            return Picture(job, None, notes, latent=pending.latent[0])
        if frame is None:
            return Picture(job, to_uint8(decoded)[0], notes, latent=pending.latent[0])
        pixels = to_uint8(paste(decoded.float(), frame.original, frame.weight))[0]
        kept = (frame.weight == 0)[0, 0].cpu().numpy()
        pixels[kept] = frame.pixels[kept]
        return Picture(job, pixels, notes, kept, pending.latent[0])

    def _notes(self, job: Job) -> dict[str, str]:
        """What the record says beside the job."""
        # another package's text model may lack it
        cut_words = getattr(self.model.cond_stage_model, "cut_words", None)
        cut = cut_words(job.prompt) if cut_words and job.prompt_syntax == "plain" else ""
        tiled = any(self.tile_side(*size) for size in {(job.height, job.width), job.upscaled_size})
        found = (("Prompt cut", cut), ("Tiles", "approximate" if tiled else ""))
        return {name: note for name, note in found if note}

    def _decode(self, latent: Tensor) -> Tensor:
        """The picture [1, 3, H, W] of scaled latents."""
        with self._one_thread, self._using(self.model.first_stage_model):
            return self._decoder(latent)(latent)

    def _rescue(self, latent: Tensor, decoded: Tensor) -> tuple[Tensor, bool]:
        """A decoded picture, and whether half precision overflowed: then it is decoded again in float32."""
        if self.precision.dtype != torch.float16 or finite(decoded)[0]:
            return decoded, False
        autoencoder = self.model.first_stage_model
        decoding = autoencoder.decoder, autoencoder.post_quant_conv
        with self._one_thread, self._at_hand(autoencoder), widened(*decoding):
            return self._decoder(latent)(latent.float()), True

    def _decoder(self, latent: Tensor) -> Callable[[Tensor], Tensor]:
        """What decodes latents of this size: as a whole or in tiles."""
        decode, factor = self.model.decode_first_stage, self.factor
        if tile := self.tile_side(*(side * factor for side in latent.shape[-2:])):
            return partial(decode_in_tiles, decode, factor=factor, tile=tile, overlap=tile // 4)
        return decode

    def _encode(self, picture: Tensor) -> DiagonalGaussianDistribution:
        """The distribution of the latents of a float picture [1, 3, H, W], in float32 as in the original."""
        with self._one_thread, self._at_hand(self.model.first_stage_model):
            if not (tile := self.tile_side(*picture.shape[-2:])):
                return self.model.encode_first_stage(picture)

            def moments(x: Tensor) -> Tensor:
                return self.model.encode_first_stage(x).parameters

            return DiagonalGaussianDistribution(
                encode_in_tiles(moments, picture, self.factor, tile, overlap=tile // 4)
            )

    def tile_side(self, height: int, width: int) -> int | None:
        """The side in latent cells of the tiles for images of a size; None if they are not cut.

        It is chosen once for each size, so that all images agree.
        """
        if (size := (height, width)) not in self.tile_sides:
            widths, available = self.model.first_stage_model.widths, available_memory(self.device)
            self.tile_sides[size] = choose_tile(self.tiles, widths, self.factor, size, available)
        return self.tile_sides[size]


def _place_notes(rows: Sequence[int], noise: NoiseSource) -> list[dict[str, str]]:
    """What the records of a batch say of the place of each image in the stream of its run."""
    places = noise.places(rows) if isinstance(noise, RunNoise) else []
    return [{"Stream": str(place)} for place in places] or [{} for _ in rows]


def _report_step(on_step: OnStep, total: int, estimate: Tensor, index: int) -> None:
    step = StepInfo(index, total, estimate)
    if on_step(step) is False:
        raise _Stopped(step)


def _stream_seeds(jobs: Sequence[Job]) -> list[int]:
    """The seeds of a batch's noise streams: one an image, or one for the run."""
    return [job.seed for job in jobs] if jobs[0].seed_mode == "image" else [jobs[0].seed]
