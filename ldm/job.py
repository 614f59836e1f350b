"""A job: one image to make, and everything that describes it."""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

MODEL_ENDINGS = (".safetensors", ".ckpt", ".pt", ".bin", ".gguf")
EMBEDDING_ENDINGS = (*MODEL_ENDINGS, ".png")
DEFAULT_STRENGTH = 0.75  # of a starting image without a given strength
RESIZES = ("fit", "fill", "stretch", "pad", "none")

MAX_CONTROLS = 16

Spacing = Literal["uniform", "compvis", "quad"]
GuidanceSchedule = Literal["constant", "linear", "cosine", "linear_down", "cosine_down", "peak", "valley"]


class MemoryImage(str):
    """An image in memory where a path is expected: `data` is a PNG file, the text a name made of its SHA-256."""

    data: bytes

    def __new__(cls, data: bytes) -> MemoryImage:
        image = super().__new__(cls, f"memory-{hashlib.sha256(data).hexdigest()[:16]}.png")
        image.data = data
        return image

    def __reduce__(self) -> tuple[type[MemoryImage], tuple[bytes]]:
        return MemoryImage, (self.data,)

    @classmethod
    def of(cls, image: Any) -> MemoryImage:
        """Encodes a PIL image, or a uint8 array [H, W], [H, W, 3] or [H, W, 4]. Raises TypeError for others."""
        from PIL import Image

        if not isinstance(image, Image.Image):
            try:
                image = Image.fromarray(image)
            except (AttributeError, TypeError, ValueError):
                raise TypeError(
                    f"an image is a path, a PIL image or a uint8 array [H, W, 3], not {type(image).__name__}"
                ) from None
        file = io.BytesIO()
        if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
            image = image.convert("RGBA" if image.has_transparency_data else "RGB")
        image.save(file, "PNG", compress_level=1, exif=image.getexif())
        return cls(file.getvalue())


@dataclass(frozen=True, slots=True)
class Init:
    """The image that a job starts from: a file, and how it is fitted to the canvas.

    `image` and `mask` are paths; PIL images and uint8 arrays [H, W, 3] are accepted too and become `MemoryImage`.
    `width` and `height` in pixels (None: the image's size, or the side that keeps its proportions) with `resize` set
    its size: "fit" inside them, "fill" them and crop, "stretch", "pad" with `background`, or "none". `outpaint` adds
    pixels at the left, top, right and bottom. `mask` is an image whose white is repainted; with `alpha_mask` and no
    mask the transparent part of the image is. With `mask_levels` grey is how much changes: the share of the steps,
    the last ones, that may do it. `mask_blur` is how far, in pixels, the repainted part fades in at its edges.
    With `crop_to_mask` only the region around the mask, and so many pixels more, is made, at `width` by `height`
    (None: the model's own), and put back into the image, which keeps its size.
    """

    image: str
    width: int | None = None
    height: int | None = None
    resize: Literal["fit", "fill", "stretch", "pad", "none"] = "none"
    background: str = "white"
    outpaint: tuple[int, int, int, int] = (0, 0, 0, 0)
    mask: str = ""
    alpha_mask: bool = False
    invert_mask: bool = False
    mask_blur: float = 4.0
    mask_levels: bool = False
    crop_to_mask: int | None = None

    def __post_init__(self) -> None:
        for name in ("image", "mask"):
            value = getattr(self, name)
            if not isinstance(value, str):
                try:
                    file = os.fsdecode(value)
                except TypeError:
                    file = MemoryImage.of(value)
                object.__setattr__(self, name, file)


@dataclass(frozen=True, slots=True)
class Job:
    """One image to make. Everything that asks for images makes jobs; everything after that sees only jobs.

    Sizes are in pixels, multiples of 8; 0, the default, is the model's default size or that of the image to start
    from, and a finished job has the size it was made in. `steps` counts denoising steps, `scale` is the
    classifier-free guidance scale (1 turns guidance off). `sampler` is one of `SOLVERS` and `schedule` one of
    `SCHEDULES` of `ldm.models.diffusion` ("auto": the sampler's own); `sigmas` or `timesteps` are the levels of noise
    themselves. `eta` is the share of fresh noise in a step (None: the sampler's own), `s_noise` a factor of it, and
    `s_churn` noise that is added before steps. `convention` is the program whose details hold where programs differ.

    `step_noise` is where the fresh noise of steps comes from: the stream of the image goes on, or a Brownian path of
    its seed ("auto": as the convention has it for the solver). `step_rng` is the generator of that noise ("auto":
    `rng`), and `step_seed_delta` is added to the seed of its stream; with either, the stream is another one than that
    of the start.

    With `seed_mode` "image" the job owns the noise stream of `seed`; with "batch" it is entry `batch_index` of the
    run's one stream from `seed`, drawn in the order of the original scripts.

    With `init` the job starts from that image at `strength`, the fraction of the steps that run: 0 returns the image
    as the autoencoder reconstructs it, 1 starts from noise alone. With `posterior` its latent is a sample of the
    autoencoder's distribution, as in the original, else the mean. `paste` restores the image's original pixels where
    its mask repaints nothing.

    `loras` are files, or names of files that the pipeline finds, each with its weight on the U-Net and on the text
    encoder. `prompt_syntax` "a1111" reads weights and BREAK in the prompts, see `ldm.prompts.weights`, and
    what changes or joins prompts, see `ldm.prompts.editing`.

    Outside of `guidance_interval`, in shares of the steps or in sigma, there is no guidance, and inside it follows
    `guidance_schedule`, see `ldm.models.diffusion.course`.
    `clip_skip` counts the text encoder's layers from the end: 1 is the last one. `guidance_rescale` is the share of a
    guided prediction that gets the contrast of the conditional one.

    `controls` are files of ControlNets, each with the image that is its hint, a weight, and the shares of the steps
    between which it acts. `hint` is what is made of those images, see `ldm.images.hints`; `control_mode` is how the
    prompt and the hint share in the result, see `ldm.models.diffusion.control`; `control_resize` is how a hint of
    another aspect is fitted ("none": it is refused).

    `image_scale` is how closely a model that edits images (InstructPix2Pix) follows `init`, and `scale` the prompt.

    With `variation_strength` above 0 the start noise is turned that share of the way to the noise of
    `variation_seed`; of several images that seed counts up, and `seed` stays.

    `seamless` joins the left and the right edge ("x"), the upper and the lower ("y"), or both.

    `cache_steps` (interval, branch, centre) and `merge_tokens`, a ratio, are approximations that save time, see
    `ldm.runtime.shortcuts`.

    With `upscale` above 1 the finished image is enlarged by that factor, as pixels or as latents (`upscale_in`), and
    denoised in a second pass at `upscale_strength`.
    """

    prompt: str
    negative_prompt: str = ""
    seed: int = 42
    width: int = 0
    height: int = 0
    steps: int = 50
    sampler: str = "ddim"
    scale: float = 7.5
    eta: float | None = None
    timestep_spacing: Spacing = "uniform"
    rng: Literal["philox", "cpu", "device", "numpy"] = "philox"
    seed_mode: Literal["image", "batch"] = "image"
    batch_index: int = 0
    init: Init | None = None
    strength: float = 1.0
    posterior: Literal["sample", "mean"] = "sample"
    paste: bool = True
    upscale: float = 1.0
    upscale_in: Literal["pixels", "latents"] = "pixels"
    upscale_strength: float = 0.5
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_interval_in: Literal["steps", "sigma"] = "steps"
    guidance_schedule: GuidanceSchedule = "constant"
    loras: tuple[tuple[str, float, float], ...] = ()
    prompt_syntax: Literal["plain", "a1111"] = "plain"
    schedule: str = "auto"
    sigmas: tuple[float, ...] = ()
    timesteps: tuple[float, ...] = ()
    s_noise: float = 1.0
    s_churn: float = 0.0
    convention: Literal["ldm", "a1111", "comfyui"] = "ldm"
    step_noise: Literal["auto", "stream", "brownian"] = "auto"
    step_rng: Literal["auto", "philox", "cpu", "device", "numpy"] = "auto"
    step_seed_delta: int = 0
    clip_skip: int = 1
    guidance_rescale: float = 0.0
    controls: tuple[tuple[str, str, float, float, float], ...] = ()
    variation_seed: int = 0
    variation_strength: float = 0.0
    seamless: Literal["none", "x", "y", "both"] = "none"
    hint: Literal["none", "canny", "grey", "scribble", "tile", "inpaint"] = "none"
    control_mode: Literal["balanced", "prompt", "control", "guess"] = "balanced"
    control_resize: Literal["none", "fill", "stretch", "pad"] = "none"
    cache_steps: tuple[int, ...] = ()
    merge_tokens: float = 0.0
    image_scale: float = 1.5

    @property
    def is_exact(self) -> bool:
        """Whether all of the U-Net is computed in each step: no `cache_steps` and no `merge_tokens`."""
        return not self.merge_tokens and self.cache_steps[:1] in ((), (1,))

    @property
    def upscaled_size(self) -> tuple[int, int]:
        """Height and width of the finished image, multiples of 8."""
        return round(self.height * self.upscale / 8) * 8, round(self.width * self.upscale / 8) * 8


V1_DEFAULTS = Job("", width=512, height=512)  # of settings that the text of a file does not state


def batch_key(job: Job) -> Job:
    """Returns all values that the jobs of one batch share: everything but seeds, prompts, and how these are used."""
    own = {"prompt": "", "negative_prompt": "", "scale": 0.0, "clip_skip": 1, "guidance_rescale": 0.0}
    return replace(job, seed=0, variation_seed=0, batch_index=0, **own)


def batches_of(jobs: Sequence[Job], size: int) -> list[list[int]]:
    """Returns the indices of jobs that share a batch, up to `size` with one `batch_key`, ordered by their first.

    One stream of noise ("batch" as the first job's seed mode) is drawn in order, so there only neighbours share
    a batch.
    """
    if jobs and jobs[0].seed_mode == "batch":
        pieces = (range(i, min(i + size, len(jobs))) for i in range(0, len(jobs), size))
        return [
            list(alike)
            for piece in pieces
            for _, alike in itertools.groupby(piece, key=lambda i: batch_key(jobs[i]))
        ]
    groups: dict[Job, list[int]] = {}
    for place, job in enumerate(jobs):
        groups.setdefault(batch_key(job), []).append(place)
    return sorted(group[i : i + size] for group in groups.values() for i in range(0, len(group), size))


_NUMBER = r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
_LORA = re.compile(rf"<(?:lora|lyco):([^<>:]+)(?::(?:te=)?({_NUMBER}))?(?::(?:unet=)?({_NUMBER}))?>")


def split_loras(text: str) -> tuple[str, tuple[tuple[str, float, float], ...]]:
    """Returns a prompt without its `<lora:name:weight>` tags, and the LoRAs that they name, as in `Job.loras`.

    As in AUTOMATIC1111's web UI, `<lora:name>` has weight 1, `<lyco:` is a synonym of `<lora:`, and of two weights
    `<lora:name:te:unet>` the first is the text encoder's. The space before tags that end a prompt is removed too.
    """
    loras: list[tuple[str, float, float]] = []
    end = -1
    for match in _LORA.finditer(text):
        name, text_weight, weight = match.groups()
        on_text = float(text_weight or 1)
        loras.append((name, float(weight or on_text), on_text))
        end = match.end()
    kept = _LORA.sub("", text)
    return kept.removesuffix(" ") if end == len(text) else kept, tuple(loras)


def lora_name(file: str) -> str:
    """Returns the name of a LoRA file: the file's name without the extension of a model file."""
    return next((file.removesuffix(end) for end in MODEL_ENDINGS if file.endswith(end)), file)


def lora_tag(name: str, weight: float, text_weight: float) -> str:
    """Returns the tag that `split_loras` reads as this LoRA."""
    numbers = [weight] if weight == text_weight else [text_weight, weight]
    return f"<lora:{':'.join([name, *(repr(float(number)).removesuffix('.0') for number in numbers)])}>"


_BETWEEN = re.compile(r"(?<=.)(?<!^[A-Za-z]):|(?<=^[A-Za-z]):(?![/\\])")  # no colon of a drive: C:\ or C:/


def split_control(text: str) -> tuple[str, str, float, float, float]:
    """Returns what `FILE:IMAGE[:WEIGHT[:START:END]]` means, as in `Job.controls`; ValueError without two paths.

    One number or three are split off at the end. FILE ends at the first colon that is not that of a Windows drive, a
    single letter before a slash.
    """
    end = re.search(rf"(?::{_NUMBER}){{0,3}}$", text)
    numbers = [] if end is None else [part for part in end[0].split(":") if part]
    if len(numbers) == 2:
        raise ValueError("two numbers at its end; give a weight, or a weight and two shares of the steps")
    paths = text.removesuffix("".join(f":{number}" for number in numbers))
    between = _BETWEEN.search(paths)
    file, image = (paths[: between.start()], paths[between.end() :]) if between else (paths, "")
    if not file or not image:
        raise ValueError("not two files; give FILE:IMAGE[:WEIGHT[:START:END]]")
    weight, start, stop = (*map(float, numbers), *(1.0, 0.0, 1.0)[len(numbers) :])
    return file, image, weight, start, stop


def control_text(file: str, image: str, weight: float, start: float, stop: float) -> str:
    """Returns the text that `split_control` reads as this control."""
    numbers = [weight] if (start, stop) == (0.0, 1.0) else [weight, start, stop]
    return ":".join([file, image, *(repr(float(number)).removesuffix(".0") for number in numbers)])
