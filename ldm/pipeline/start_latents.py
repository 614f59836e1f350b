"""The starts of a batch other than noise: the images of jobs, their masks, and enlarged images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldm.images.canvas import Canvas, open_canvas
from ldm.images.mask import fade, hide, to_latent_mask
from ldm.images.pixels import from_uint8
from ldm.images.resample import enlarge_latents, enlarge_pixels
from ldm.job import Init, Job
from ldm.models.diffusion.ddpm import LatentDiffusion, LatentEditDiffusion, LatentInpaintDiffusion
from ldm.models.diffusion.noise import NoiseSource
from ldm.models.diffusion.sampling_run import MaskLevels
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.pipeline.conditioning import Channels
from ldm.pipeline.first_stage import FirstStage
from ldm.pipeline.image import GeneratedImage, Paste
from ldm.pipeline.upscaler import Upscaler, load_upscaler

OpenCanvas = Callable[[Init], Canvas]


@dataclass(frozen=True)
class StartLatents:
    """Latents [N, C, h, w] that a batch starts from; `keep` [1, 1, h, w] is 1 where they stay as they are."""

    latents: Tensor
    keep: Tensor | MaskLevels | None = None


class Starts:
    """The images that jobs start from, as latents and masks; those of the last few images are kept."""

    def __init__(self, model: LatentDiffusion, first_stage: FirstStage, canvases: OpenCanvas | None) -> None:
        self._model, self._first_stage = model, first_stage
        self.upscaler: Upscaler | None = None  # instead of a filter, where pixels are enlarged
        self.clear(canvases)

    def clear(self, canvases: OpenCanvas | None) -> None:
        """Forgets all images; from now on `canvases` opens them, or if it is None `open_canvas`."""
        side = self._model.image_size * self._first_stage.factor
        own = partial(open_canvas, own_side=side)
        self.canvas = lru_cache(maxsize=8)(own) if canvases is None else canvases
        self._distribution = lru_cache(maxsize=4)(self._encode_canvas)
        self._grey_distribution = lru_cache(maxsize=4)(self._encode_grey)
        self._seen = lru_cache(maxsize=4)(self._encode_seen)
        self._weight = lru_cache(maxsize=4)(self._faded_mask)

    def _faded_mask(self, init: Init) -> Tensor:
        """The weight of what is made at each pixel of the finished image [1, 1, H, W]."""
        region = self.canvas(init).region
        mask = self._mask(init) if region is None else self._moved(region.repaint)
        return fade(mask > 0, init.mask_blur)

    def size_of(self, job: Job) -> tuple[int, int]:
        """Height and width of the image that a job starts from, or else those that the model was trained at."""
        if job.init is None:
            side = self._model.image_size * self._first_stage.factor
            return side, side
        return self.size_at(job.init)

    def size_at(self, init: Init) -> tuple[int, int]:
        """Height and width of the canvas of an image."""
        height, width, _ = self.canvas(init).pixels.shape
        return height, width

    def sized(self, job: Job) -> Job:
        """The job with a size in pixels: that of `size_of` where a side is 0."""
        if job.height and job.width:
            return job
        height, width = self.size_of(job)
        return replace(job, height=job.height or height, width=job.width or width)

    def has_mask(self, init: Init | None) -> bool:
        """Whether only a part of the image is repainted."""
        return init is not None and self.canvas(init).repaint is not None

    def keeps_masked(self, init: Init | None) -> bool:
        """Whether the sampler puts the rest of the image back at every step; an inpainting model sees it instead."""
        return self.has_mask(init) and not isinstance(self._model, LatentInpaintDiffusion)

    def mean_latents(self, init: Init) -> Tensor:
        """The scaled latents [1, C, h, w] of an image: the mean of their distribution."""
        return self._model.get_first_stage_encoding(self._distribution(init, False).mode())

    def latents(self, jobs: Sequence[Job], posterior: NoiseSource) -> StartLatents | None:
        """The image that a batch starts from; None if it starts from noise."""
        init = jobs[0].init
        if init is None:
            return None
        latents = self._draw(self._distribution(init, False), jobs, posterior)
        if not self.keeps_masked(init):
            return StartLatents(latents)
        keep = 1 - to_latent_mask(self._mask(init), self._factor, nearest=False)
        return StartLatents(latents, MaskLevels(keep) if init.mask_levels else keep)

    def enlarged(self, jobs: Sequence[Job], latents: Tensor) -> StartLatents:
        """The results of the first pass at the size of the second."""
        height, width = jobs[0].upscaled_size
        if jobs[0].upscale_in == "latents":
            return StartLatents(enlarge_latents(latents, height // self._factor, width // self._factor))
        images = [image.float() for image in self._first_stage.decode_all(latents)]
        larger = images if self.upscaler is None else [self.upscaler(image) for image in images]
        encoded = [self._first_stage.encode(enlarge_pixels(image, height, width)).mode() for image in larger]
        return StartLatents(self._model.get_first_stage_encoding(torch.cat(encoded)))

    def channels(
        self, jobs: Sequence[Job], size: tuple[int, int], upscaled: bool, posterior: NoiseSource
    ) -> Channels | None:
        """The channels of the image in a pass of height and width `size`; None for a model without such an input."""
        init = jobs[0].init
        if isinstance(self._model, LatentInpaintDiffusion):
            return self._unmasked(jobs, None if upscaled else init, size, posterior)
        if not isinstance(self._model, LatentEditDiffusion):
            return None
        if init is None:
            shape = self._model.channels, *(side // self._factor for side in size)
            return Channels((torch.zeros(1, *shape, device=self._device),))
        latents = self._seen(init, size)
        return Channels((latents,), (torch.zeros_like(latents),))

    def _encode_seen(self, init: Init, size: tuple[int, int]) -> Tensor:
        """The latents [1, C, h, w] of an image to edit, without scale, as InstructPix2Pix was trained with them."""
        if self.size_at(init) == size:
            return self._distribution(init, False).mode()
        return self._first_stage.encode(enlarge_pixels(self._image(init), *size)).mode()

    def _unmasked(
        self, jobs: Sequence[Job], init: Init | None, size: tuple[int, int], posterior: NoiseSource
    ) -> Channels:
        """The channels of an inpainting model: without an image or a mask it sees nothing, like any other model."""
        if init is not None and self.has_mask(init):
            mask, distribution = self._mask(init), self._distribution(init, True)
        else:
            mask, distribution = torch.ones(1, 1, *size, device=self._device), self._grey_distribution(*size)
        seen = to_latent_mask(mask, self._factor, nearest=True), self._draw(distribution, jobs, posterior)
        return Channels(seen)

    def use_upscaler(self, file: str | Path | None) -> None:
        """Enlarges images by the network in a file from now on, see `Pipeline.use_upscaler`."""
        self.upscaler = None if file is None else load_upscaler(str(file))

    def larger(self, image: GeneratedImage) -> GeneratedImage:
        """A finished image as the upscaler enlarges it, if there is one and a second pass has not used it."""
        if self.upscaler is None or image.job.upscale > 1 or image.pixels is None:
            return image
        return replace(image, pixels=self.upscaler.enlarge(image.pixels, self._device), kept=None)

    def paste(self, job: Job) -> Paste | None:
        """Returns what of a job's image is put back into the result, if anything is."""
        init = job.init
        if init is None or not self.has_mask(init):
            return None
        region = self.canvas(init).region
        if region is None:
            if not job.paste or job.upscale > 1:
                return None
            return Paste(self._image(init), self._weight(init), self.canvas(init).pixels)
        original = from_uint8(region.pixels[region.visible][None]).to(self._device)
        weight = self._weight(init)[(..., *region.visible)]
        return Paste(original, weight if job.paste else torch.ones_like(weight), region.pixels, region)

    @property
    def _factor(self) -> int:
        return self._first_stage.factor

    @property
    def _device(self) -> torch.device:
        return self._model.device

    def _image(self, init: Init) -> Tensor:
        """The canvas as a float image [1, 3, H, W] in [-1, 1]."""
        return from_uint8(self.canvas(init).pixels[None]).to(self._device)

    def _mask(self, init: Init) -> Tensor:
        """The canvas's mask [1, 1, H, W], 1 where it is repainted; less where only the last steps may do it."""
        return self._moved(self.canvas(init).repaint)

    def _moved(self, mask: np.ndarray | None) -> Tensor:
        return torch.from_numpy(mask).to(self._device)[None, None].float()

    def _encode_canvas(self, init: Init, hide_mask: bool) -> DiagonalGaussianDistribution:
        image = self._image(init)
        return self._first_stage.encode(hide(image, self._mask(init)) if hide_mask else image)

    def _encode_grey(self, height: int, width: int) -> DiagonalGaussianDistribution:
        """The latents of an image of which an inpainting model sees nothing."""
        return self._first_stage.encode(torch.zeros(1, 3, height, width, device=self._device))

    def _draw(
        self, distribution: DiagonalGaussianDistribution, jobs: Sequence[Job], posterior: NoiseSource
    ) -> Tensor:
        """Scaled latents [N, C, h, w], one for each job, by its `posterior`."""
        shape = (len(jobs), *distribution.mean.shape[1:])
        if jobs[0].posterior == "mean":
            return self._model.get_first_stage_encoding(distribution.mode().expand(shape))
        return self._model.get_first_stage_encoding(distribution, posterior.draw(shape))
