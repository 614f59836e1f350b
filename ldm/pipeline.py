"""Job -> conditioning -> latents -> pixels: the Python API, and the one place that knows every room."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ldm.checkpoints.load import Ema, load_into, undrawn
from ldm.checkpoints.reader import read_checkpoint
from ldm.config import ConfigError
from ldm.images.canvas import Canvas, open_canvas
from ldm.images.mask import fade, hide, paste, to_latent_mask
from ldm.images.pixels import finite, from_uint8, to_uint8
from ldm.images.resample import enlarge_latents, enlarge_pixels
from ldm.job import Init, Job
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.ddpm import LatentDiffusion, LatentInpaintDiffusion
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.guidance import Conditioning
from ldm.models.diffusion.noise import NoiseSource, noise_source
from ldm.models.diffusion.plms import PLMSSampler
from ldm.models.diffusion.sampler import Sampler
from ldm.models.diffusion.schedule import steps_to_run
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.runtime.device import FULL, Precision
from ldm.runtime.tiling import (
    available_memory,
    choose_tiles,
    decode_in_tiles,
    encode_in_tiles,
    needed_memory,
)
from ldm.util import InputError, instantiate_from_config, printable

logger = logging.getLogger(__name__)

SAMPLERS: Mapping[str, type[Sampler]] = {
    "ddim": DDIMSampler, "plms": PLMSSampler, "dpm_solver": DPMSolverSampler,
}  # fmt: skip


def load_model(
    config: Mapping[str, Any],
    ckpt: str | Path,
    device: torch.device | str = "cpu",
    ema: Ema = "auto",
    mmap: bool = True,
) -> LatentDiffusion:
    """The model of a checked config with the weights of a checkpoint, in float32, ready to sample.

    It is built without memory of its own and takes the checkpoint's tensors; see `ldm.checkpoints` for what
    is refused.
    """
    try:
        with torch.device("meta"), undrawn():
            model = instantiate_from_config(config)
    except InputError:
        raise
    except Exception as error:  # whatever a wrong value leads to, the config is at fault
        reason = printable(f"{type(error).__name__}: {error}")
        raise ConfigError(f"the config describes no model that can be built: {reason}") from error
    if not isinstance(model, LatentDiffusion):
        raise ConfigError(f"the config's model {config['target']} is no LatentDiffusion")
    load_into(model, read_checkpoint(ckpt, mmap=mmap), dtype=torch.float32, ema=ema)
    return model.eval().to(device)


@dataclass(frozen=True)
class Picture:
    """What became of a job: uint8 pixels [H, W, 3], or None if they were not finite, and notes for the record."""

    job: Job
    pixels: np.ndarray | None
    notes: Mapping[str, str]


@dataclass(frozen=True)
class Origin:
    """What a batch starts from other than noise: latents [N, C, h, w]; `keep` [1, 1, h, w] is 1 where they stay."""

    latents: Tensor
    keep: Tensor | None = None


class Pipeline:
    """A loaded model that makes pictures from jobs.

    `canvases` opens the pictures that jobs start from. `tiles` says whether the autoencoder works piece by
    piece: "auto" does where a picture would not fit into memory otherwise; the result is then approximate.
    """

    def __init__(
        self,
        model: LatentDiffusion,
        precision: Precision = FULL,
        canvases: Callable[[Init], Canvas] | None = None,
        tiles: Literal["auto", "on", "off"] = "auto",
    ):
        self.model = model
        self.precision = precision
        self.canvas = cache(open_canvas) if canvases is None else canvases
        self.tiles = tiles
        # autocast keeps its casts of weights only if they could be trained; otherwise it casts at every step
        model.model.requires_grad_(precision.autocast is not None)
        self._encode_prompt = lru_cache(maxsize=64)(self._encode_one)
        self._distribution = lru_cache(maxsize=4)(self._encode_canvas)
        self._hidden_all = lru_cache(maxsize=4)(self._encode_grey)

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return self.model.device

    @property
    def factor(self) -> int:
        """How many pixels one latent value spans along each side."""
        return self.model.first_stage_model.downsampling

    def noise(self, jobs: Sequence[Job]) -> NoiseSource:
        """The noise of one batch of jobs; with seed mode "batch", keep the first batch's for the whole run."""
        return self._noise(jobs, jobs[0].rng)

    def _noise(self, jobs: Sequence[Job], rng: Literal["philox", "cpu", "device", "numpy"]) -> NoiseSource:
        seeds = [job.seed for job in jobs] if jobs[0].seed_mode == "image" else [jobs[0].seed]
        return noise_source(rng, jobs[0].seed_mode, seeds, self.device)

    def start_code(self, job: Job, count: int, noise: NoiseSource) -> Tensor:
        """The start noise of a batch of `count` jobs like this one [count, C, h, w], drawn from `noise`."""
        return noise.draw((count, self.model.channels, job.height // self.factor, job.width // self.factor))

    @torch.inference_mode()
    def make(
        self,
        jobs: Sequence[Job],
        noise: NoiseSource | None = None,
        start_code: Tensor | None = None,
        on_step: Callable[[int], object] | None = None,
    ) -> list[Picture]:
        """The pictures of jobs that differ at most in prompts and seeds, as one batch.

        `noise` is the batch's own by default, `start_code` is drawn from it; `on_step(i)` is called behind
        each denoising step.
        """
        job = jobs[0]
        if len({replace(j, prompt="", negative_prompt="", seed=0, batch_index=0) for j in jobs}) > 1:
            raise ValueError("the jobs of one batch may differ in prompts and seeds only")
        noise = self.noise(jobs) if noise is None else noise
        code = self.start_code(job, len(jobs), noise) if start_code is None else start_code
        hidden = self._hidden(jobs, job.init, job.height, job.width)
        latents = self._denoise(jobs, self._origin(jobs), job.strength, code, hidden, noise, on_step)
        if job.upscale > 1:
            origin = self._enlarged(jobs, latents)
            code = noise.draw(origin.latents.shape)
            hidden = self._hidden(jobs, None, *job.upscaled_size)
            latents = self._denoise(jobs, origin, job.upscale_strength, code, hidden, noise, on_step)
        return [self._picture(job, latent[None]) for job, latent in zip(jobs, latents, strict=True)]

    # --- conditioning ---------------------------------------------------------------------------------------

    def _encode_one(self, prompt: str) -> Tensor:
        return self.model.get_learned_conditioning([prompt])

    def _condition(self, prompts: Sequence[str], hidden: tuple[Tensor, Tensor] | None) -> Conditioning:
        context = torch.cat([self._encode_prompt(prompt) for prompt in prompts])
        if hidden is None:
            return context
        assert isinstance(self.model, LatentInpaintDiffusion)
        return self.model.hybrid_conditioning(
            context, *(part.expand(len(context), -1, -1, -1) for part in hidden)
        )

    def _hidden(
        self, jobs: Sequence[Job], init: Init | None, height: int, width: int
    ) -> tuple[Tensor, Tensor] | None:
        """For an inpainting model: its mask [1, 1, h, w], 1 is repainted, and the latents of what it may see.

        Without a picture or a mask it may see nothing, and is a model like any other.
        """
        if not isinstance(self.model, LatentInpaintDiffusion):
            return None
        if init is None or self.canvas(init).repaint is None:
            repaint = torch.ones(1, 1, height, width, device=self.device)
            distribution = self._hidden_all(height, width)
        else:
            repaint, distribution = self._repaint(init), self._distribution(init, True)
        return to_latent_mask(repaint, self.factor, nearest=True), self._draw(distribution, jobs)

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

    def _draw(self, distribution: DiagonalGaussianDistribution, jobs: Sequence[Job]) -> Tensor:
        """Scaled latents [N, C, h, w], one for each job, by its `posterior`.

        A draw's noise comes from a CPU stream of its own: the noise that denoising starts from stays the one of
        text to image, and equal on every device.
        """
        if jobs[0].posterior == "mean":
            return self.model.get_first_stage_encoding(distribution.mode().expand(len(jobs), -1, -1, -1))
        noise = self._noise(jobs, "cpu").draw((len(jobs), *distribution.mean.shape[1:]))
        return self.model.get_first_stage_encoding(distribution, noise)

    def _encode_grey(self, height: int, width: int) -> DiagonalGaussianDistribution:
        """What an inpainting model sees of a picture that is hidden as a whole."""
        return self._encode(torch.zeros(1, 3, height, width, device=self.device))

    def _origin(self, jobs: Sequence[Job]) -> Origin | None:
        init = jobs[0].init
        if init is None:
            return None
        latents = self._draw(self._distribution(init, False), jobs)
        if self.canvas(init).repaint is None or isinstance(self.model, LatentInpaintDiffusion):
            return Origin(latents)
        return Origin(latents, 1 - to_latent_mask(self._repaint(init), self.factor, nearest=False))

    def _enlarged(self, jobs: Sequence[Job], latents: Tensor) -> Origin:
        height, width = jobs[0].upscaled_size
        if jobs[0].upscale_in == "latents":
            return Origin(enlarge_latents(latents, height // self.factor, width // self.factor))
        pictures = [self._decode(latent[None])[0].float() for latent in latents]
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
        on_step: Callable[[int], object] | None,
    ) -> Tensor:
        """Latents [N, C, h, w] from the noise `code`, or from `origin` at `strength`."""
        job = jobs[0]
        sampler = SAMPLERS[job.sampler](self.model)
        sampler.make_schedule(job.steps, job.timestep_spacing, job.eta, verbose=False)
        count = steps_to_run(1.0 if origin is None else strength, job.steps, len(sampler.table))
        if origin is not None and count == 0:
            return origin.latents
        with self.precision.context(self.device):
            return sampler.decode(
                code if origin is None else sampler.start_from(origin.latents, count, code),
                self._condition([job.prompt for job in jobs], hidden),
                count,
                unconditional_guidance_scale=job.scale,
                unconditional_conditioning=None
                if job.scale == 1.0
                else self._condition([job.negative_prompt for job in jobs], hidden),
                callback=on_step,
                noise=noise,
                mask=None if origin is None else origin.keep,
                x0=None if origin is None else origin.latents,
            )

    # --- pixels -----------------------------------------------------------------------------------------------

    def _picture(self, job: Job, latent: Tensor) -> Picture:
        """Decodes one latent [1, C, h, w] and puts what is kept of the job's own picture back."""
        # another package's text model may lack it
        cut_words = getattr(self.model.cond_stage_model, "cut_words", None)
        cut = cut_words(job.prompt) if cut_words else ""
        decoded, notes = self._decode(latent)
        notes = ({"Prompt cut": cut} if cut else {}) | notes
        if not finite(decoded)[0]:
            return Picture(job, None, notes)
        if job.init is None or self.canvas(job.init).repaint is None or not job.paste or job.upscale > 1:
            return Picture(job, to_uint8(decoded)[0], notes)
        return Picture(job, self._pasted(job.init, decoded), notes)

    def _pasted(self, init: Init, decoded: Tensor) -> np.ndarray:
        """The decoded picture [1, 3, H, W] as pixels, with the canvas's own bytes where nothing is repainted."""
        weight = fade(self._repaint(init), init.mask_blur)
        blended = to_uint8(paste(decoded.float(), self._original(init), weight))[0]
        untouched = (weight == 0)[0, 0].cpu().numpy()
        return np.where(untouched[..., None], self.canvas(init).pixels, blended)

    def _decode(self, latent: Tensor) -> tuple[Tensor, dict[str, str]]:
        """The picture [1, 3, H, W] of scaled latents; if half precision overflows, once more in float32."""
        factor = self.factor
        if tiled := self._needs_tiles(latent.shape[-2] * latent.shape[-1] * factor**2):
            decode = partial(decode_in_tiles, self.model.decode_first_stage, factor=factor)
        else:
            decode = self.model.decode_first_stage
        notes = {"Decoded in tiles": "approximate"} if tiled else {}
        with self.precision.context(self.device):
            decoded = decode(latent)
        if not finite(decoded)[0] and self.precision.autocast is not None:
            decoded = decode(latent.float())
            notes["Decoded in"] = "float32"
        return decoded, notes

    def _encode(self, picture: Tensor) -> DiagonalGaussianDistribution:
        """The distribution of the latents of a float picture [1, 3, H, W], in float32 as in the original."""
        if not self._needs_tiles(picture.shape[-2] * picture.shape[-1]):
            return self.model.encode_first_stage(picture)
        return DiagonalGaussianDistribution(
            encode_in_tiles(lambda x: self.model.encode_first_stage(x).parameters, picture, self.factor)
        )

    def _needs_tiles(self, pixels: int) -> bool:
        if self.tiles != "auto":
            return self.tiles == "on"
        needed = needed_memory(self.model.first_stage_model.widths, pixels)
        return choose_tiles(needed, available_memory(self.device))
