"""The subjects of a benchmark: this toolkit, or a peer, under one protocol."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor


PROMPT = "a photograph of an astronaut riding a horse, number {}"
GUIDANCE = 7.5


@dataclass(frozen=True)
class Setting:
    """The settings of one process. `spawned` is the time at which it was started, in seconds since 1970."""

    subject: str  # ours, or one of `options.PEERS`
    config: str
    ckpt: str
    folder: str
    precision: str
    device: str
    threads: int
    batch: int
    mode: str  # txt2img, img2img
    strength: float
    picture: str
    compiled: bool
    malloc: str  # system, tuned
    seed: int
    spawned: float
    fast: str = "exact"  # of `ldm.cli.fast`; ours only
    packed: str = ""  # the folder below which packed weights are kept; ours only

    @property
    def name(self) -> str:
        """The subject in tables."""
        fast, packed = self.fast if self.fast != "exact" else "", "packed" if self.packed else ""
        return " ".join(word for word in (self.subject, self.precision, fast, packed) if word)


@dataclass(frozen=True)
class Work:
    """One batch: its size in pixels and its steps, of which `limit` are run; `number` makes its prompt unique."""

    size: int
    steps: int
    limit: int
    number: int
    outdir: str  # where PNG files go; empty: nowhere


class Enough(Exception):
    """Ends a run after the last step that is needed."""


class Stopwatch:
    """Measures the seconds of each phase; on a CUDA device by its events, without synchronising."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.spans: dict[str, list[tuple[Any, Any]]] = {}
        self.steps: list[Any] = []
        self.began: Any = None  # the first step
        self.first_step_at = 0.0
        self.latents: list[Tensor] = []
        self.limit = 0

    def start(self, work: Work) -> None:
        self.spans, self.steps, self.latents, self.limit = {}, [], [], work.limit
        self.began = None

    def mark(self) -> Any:
        import torch

        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))
            return event
        if self.device.type == "mps":
            torch.mps.synchronize()
        return time.perf_counter()

    def timed(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps `function` to record its time under `phase`."""

        def call(*args: Any, **kwargs: Any) -> Any:
            before = self.mark()
            if phase == "unet" and self.began is None:
                self.began = before
            result = function(*args, **kwargs)
            self.spans.setdefault(phase, []).append((before, self.mark()))
            return result

        return call

    def decoding(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps `function` to record its time as the decoder's, and to keep the latents that it receives."""
        timed = self.timed("decode", function)

        def call(latents: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.latents.append(latents)
            return timed(latents, *args, **kwargs)

        return call

    def step(self) -> None:
        """Records one step; called after each."""
        if not self.steps:
            self.settle()
            self.first_step_at = time.time()
        self.steps.append(self.mark())
        if len(self.steps) == self.limit:
            raise Enough

    def settle(self) -> None:
        """Waits until the device is idle."""
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self) -> dict[str, list[float]]:
        """Returns the seconds by phase; calls of a phase in one batch are summed, except steps and U-Net calls."""
        self.settle()
        taken = {name: [_between(*span) for span in spans] for name, spans in self.spans.items()}
        for name in ("text", "encode", "decode"):
            if name in taken:
                taken[name] = [sum(taken[name])]
        pairs = itertools.pairwise([self.began, *self.steps])
        first, *rest = (_between(*pair) for pair in pairs)
        return taken | {"first step": [first], "step": rest}


def _between(before: Any, after: Any) -> float:
    return after - before if isinstance(before, float) else before.elapsed_time(after) / 1000


class Subject(Protocol):
    """A toolkit that generates images, with a stopwatch in its phases."""

    watch: Stopwatch
    compiling: (
        float  # the seconds that compiling the U-Net took in the last batch, 0 if it was compiled before
    )

    @property
    def latents(self) -> tuple[int, int]:
        """The channels of latents, and how many pixels one of them spans along each side."""
        ...

    def facts(self) -> dict[str, Any]:
        """Returns the settings that it runs with."""
        ...

    def make(self, work: Work, noise: Tensor) -> list[Any]:
        """Generates the images of a batch from its start noise."""
        ...

    def save(self, images: list[Any], outdir: Path) -> None: ...


class OpenSubject(Subject, Protocol):
    """A subject whose networks can be called."""

    def arrange(self, channels_last: bool) -> None:
        """Sets the memory layout of its weights."""
        ...

    def predict(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """Calls the U-Net once."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Decodes scaled latents to a float image in [-1, 1]."""
        ...


class Ours:
    """This toolkit, through its Python API."""

    def __init__(self, setting: Setting) -> None:
        from ldm.config import read_config
        from ldm.pipeline import Pipeline, load_model, packed_weights
        from ldm.runtime.device import resolve_device, resolve_precision

        self.setting, self.compiling = setting, 0.0
        device = resolve_device(setting.device)
        precision = resolve_precision(setting.precision, device)
        model = load_model(read_config(setting.config), setting.ckpt, device, dtype=None)
        folder, files = Path(setting.packed), [Path(setting.ckpt)]
        packed = packed_weights(folder, files, "auto", precision) if setting.packed else None
        self.pipeline = Pipeline(model, precision, tiles="off", compiled=setting.compiled, packed=packed)
        self.watch = watch = Stopwatch(device)
        model.get_learned_conditioning = watch.timed("text", model.get_learned_conditioning)
        model.encode_first_stage = watch.timed("encode", model.encode_first_stage)
        model.apply_model = watch.timed("unet", model.apply_model)
        model.decode_first_stage = watch.decoding(model.decode_first_stage)

    @property
    def latents(self) -> tuple[int, int]:
        return self.pipeline.model.channels, self.pipeline.factor

    def facts(self) -> dict[str, Any]:
        return {"runs in": self.pipeline.precision.name}

    def make(self, work: Work, noise: Tensor) -> list[Any]:
        from ldm.cli.fast import FAST
        from ldm.job import Init, Job
        from ldm.seeds import count_up

        start = self.setting.mode == "img2img"
        init = Init(self.setting.picture, work.size, work.size, "fill") if start else None
        jobs = [
            Job(
                prompt=PROMPT.format(work.number),
                negative_prompt=f"{work.number}",
                seed=count_up(self.setting.seed, i, "philox"),
                width=work.size,
                height=work.size,
                steps=work.steps,
                scale=GUIDANCE,
                init=init,
                strength=self.setting.strength if start else 1.0,
                **FAST[self.setting.fast],
            )
            for i in range(self.setting.batch)
        ]
        return self.pipeline.make(jobs, start_code=noise, on_step=lambda _: self.watch.step())

    def save(self, images: list[Any], outdir: Path) -> None:
        from ldm.images.writer import RunFolder

        with RunFolder(outdir) as folder:
            for image in images:
                folder.save_sample(image.pixels)

    def arrange(self, channels_last: bool) -> None:
        raise ValueError("this toolkit lays its weights out by itself")

    def encode(self, prompts: list[str]) -> Tensor:
        return self.pipeline.model.get_learned_conditioning(prompts)

    def predict(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        with self.pipeline.precision.context(self.pipeline.device):
            return self.pipeline.model.apply_model(x, t, context)

    def decode(self, latents: Tensor) -> Tensor:
        with self.pipeline.precision.context(self.pipeline.device):
            return self.pipeline.model.decode_first_stage(latents)


class Diffusers:
    """The pipeline of diffusers, loaded from a folder in its usual way."""

    def __init__(self, setting: Setting) -> None:
        import diffusers
        import torch
        import transformers

        from ldm.runtime.device import resolve_device

        for package in (diffusers, transformers):
            package.utils.logging.disable_progress_bar()
        self.setting = setting
        self.version = diffusers.__version__
        self.dtype = getattr(torch, setting.precision)
        device = resolve_device(setting.device)
        kind = (
            diffusers.StableDiffusionImg2ImgPipeline
            if setting.mode == "img2img"
            else diffusers.StableDiffusionPipeline
        )
        low = diffusers.utils.is_accelerate_available()
        self.pipe: Any = kind.from_pretrained(
            setting.folder, torch_dtype=self.dtype, low_cpu_mem_usage=low, local_files_only=True
        ).to(device)
        self.pipe.scheduler = diffusers.DDIMScheduler.from_config(
            self.pipe.scheduler.config, clip_sample=False
        )
        self.pipe.set_progress_bar_config(disable=True)
        self.low, self.layout = low, "plain"
        self.watch = watch = Stopwatch(device)
        pipe, unet = self.pipe, self.pipe.unet
        self.compiling = 0.0
        pipe.encode_prompt = watch.timed("text", pipe.encode_prompt)
        pipe.vae.encode = watch.timed("encode", pipe.vae.encode)
        unet.forward = watch.timed("unet", self.network(unet))
        pipe.vae.decode = watch.decoding(pipe.vae.decode)

    def network(self, unet: torch.nn.Module) -> Callable[..., Any]:
        """Returns the function that is called in place of the U-Net's `forward`."""
        import torch

        return torch.compile(unet.forward) if self.setting.compiled else unet.forward

    @property
    def latents(self) -> tuple[int, int]:
        return self.pipe.unet.config.in_channels, self.pipe.vae_scale_factor

    def facts(self) -> dict[str, Any]:
        return {
            "runs in": str(self.dtype).removeprefix("torch."),
            "diffusers": self.version,
            "layout": self.layout,
            "low_cpu_mem_usage": self.low,
        }

    def make(self, work: Work, noise: Tensor) -> list[Any]:
        import torch

        def after_step(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            self.watch.step()
            return tensors

        prompts = [PROMPT.format(work.number)] * self.setting.batch
        common: dict[str, Any] = {
            "negative_prompt": [f"{work.number}"] * self.setting.batch,
            "num_inference_steps": work.steps,
            "guidance_scale": GUIDANCE,
            "callback_on_step_end": after_step,
        }
        if self.setting.mode == "txt2img":
            code = noise.to(self.dtype)
            return self.pipe(prompts, height=work.size, width=work.size, latents=code, **common).images
        from PIL import Image

        with Image.open(self.setting.picture) as file:
            start = file.convert("RGB").resize((work.size, work.size), Image.Resampling.LANCZOS)
        generator = torch.Generator().manual_seed(self.setting.seed)
        return self.pipe(
            prompts, image=start, strength=self.setting.strength, generator=generator, **common
        ).images

    def save(self, images: list[Any], outdir: Path) -> None:
        save_pillow(images, outdir)

    def arrange(self, channels_last: bool) -> None:
        import torch

        self.layout = "channels-last" if channels_last else "plain"
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.pipe.unet.to(memory_format=memory_format)
        self.pipe.vae.to(memory_format=memory_format)

    def predict(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return self.pipe.unet(x.to(self.dtype), t, encoder_hidden_states=context.to(self.dtype)).sample

    def decode(self, latents: Tensor) -> Tensor:
        return self.pipe.vae.decode(latents.to(self.dtype) / self.pipe.vae.config.scaling_factor).sample


def save_pillow(images: list[Any], outdir: Path) -> None:
    """Writes Pillow's images as numbered PNG files."""
    outdir.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        image.save(outdir / f"{i:05d}.png")
