"""Peers on other runtimes: those that run the U-Net of diffusers' pipeline, and stable-diffusion.cpp."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.benchmark.subjects import GUIDANCE, PROMPT, Diffusers, Setting, Stopwatch, Work, save_pillow

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SAMPLES = 2  # of noise, for the ranges of 8-bit activations
OPENVINO_TYPES = {"bfloat16": "bf16", "float16": "f16", "float32": "f32", "int8": "bf16"}


def _package(name: str) -> Any:
    """Imports a package that has no types, and need not be there."""
    return import_module(name)


class OpenVino(Diffusers):
    """The pipeline of diffusers with its U-Net compiled by OpenVINO, for each shape once.

    In "int8" weights and activations are 8-bit numbers as nncf chooses them (`nncf.quantize`, SmoothQuant, its model
    type "transformer"), the rest bf16.
    """

    def __init__(self, setting: Setting) -> None:
        self._compiled: dict[tuple[int, ...], Any] = {}
        self._chosen = setting.precision
        held = "bfloat16" if setting.precision == "int8" else setting.precision
        super().__init__(replace(setting, precision=held, compiled=False))

    def facts(self) -> dict[str, Any]:
        versions: dict[str, Any] = {"openvino": _package("openvino").__version__}
        if self._chosen == "int8":
            versions["nncf"] = _package("nncf").__version__
        return super().facts() | {"runs in": self._chosen} | versions

    def network(self, unet: torch.nn.Module) -> Callable[..., Any]:
        original = unet.forward

        def forward(
            sample: Tensor,
            timestep: Any,
            encoder_hidden_states: Tensor,
            return_dict: bool = True,
            **unused: Any,
        ) -> Any:
            import torch
            from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

            inputs = [sample.float(), torch.as_tensor(timestep).reshape(-1)[:1].float()]
            inputs.append(encoder_hidden_states.float())
            shape = tuple(sample.shape)
            if shape not in self._compiled:
                before = time.perf_counter()
                self._compiled[shape] = self._compile(original, inputs)
                self.compiling = time.perf_counter() - before
            out = self._compiled[shape]([value.numpy() for value in inputs])[0]
            eps = torch.from_numpy(out).to(sample.dtype)
            return UNet2DConditionOutput(sample=eps) if return_dict else (eps,)

        return forward

    def _compile(self, original: Callable[..., Any], inputs: list[Tensor]) -> Any:
        """Compiles the U-Net for inputs of these shapes alone; what it was converted to is kept in a file."""
        import torch

        openvino = _package("openvino")
        versions = [openvino.__version__.split("-")[0]]
        versions += [_package("nncf").__version__] if self._chosen == "int8" else []
        shape = "x".join(map(str, inputs[0].shape))
        path = Path(self.setting.folder) / f"openvino-{'-'.join([self._chosen, shape, *versions])}.xml"
        if not path.exists():
            model = self._converted(original, inputs)
            half = self._chosen != "float32"
            part = path.with_name(f"part-{path.name}")
            openvino.save_model(model, str(part), compress_to_fp16=half)
            part.with_suffix(".bin").replace(path.with_suffix(".bin"))
            part.replace(path)
        hints: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": OPENVINO_TYPES[self._chosen],
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        return openvino.Core().compile_model(str(path), "CPU", hints)

    def _converted(self, original: Callable[..., Any], inputs: list[Tensor]) -> Any:
        """Converts the U-Net in memory, for inputs of these shapes alone."""
        import torch

        class Bare(torch.nn.Module):
            def __init__(self, unet: torch.nn.Module) -> None:
                super().__init__()
                self.unet = unet

            def forward(self, sample: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
                return original(sample, timestep, context, return_dict=False)[0]

        unet = self.pipe.unet.float()
        fast, unet.forward = unet.forward, original
        try:
            model = _package("openvino").convert_model(
                Bare(unet).eval(), example_input=tuple(inputs), input=[list(value.shape) for value in inputs]
            )
        finally:
            unet.forward = fast
            unet.to(self.dtype)
        return self._rounded(model, inputs) if self._chosen == "int8" else model

    def _rounded(self, model: Any, inputs: list[Tensor]) -> Any:
        import torch

        nncf = _package("nncf")

        def samples() -> Iterator[list[Any]]:
            generator = torch.Generator().manual_seed(0)
            for number in range(SAMPLES):
                noise = torch.randn(inputs[0].shape, generator=generator)
                time_now = torch.full_like(inputs[1], 999.0 * (1 - number / SAMPLES))
                yield [value.numpy() for value in (noise, time_now, inputs[2])]

        return nncf.quantize(
            model,
            nncf.Dataset(list(samples())),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=SAMPLES,
        )


class Zentorch(Diffusers):
    """The pipeline of diffusers with its U-Net compiled by torch.compile with AMD's backend, for each shape once.

    The time of compiling includes the first call.
    """

    def __init__(self, setting: Setting) -> None:
        super().__init__(replace(setting, compiled=False))

    def facts(self) -> dict[str, Any]:
        return super().facts() | {"zentorch": version("zentorch")}

    def network(self, unet: torch.nn.Module) -> Callable[..., Any]:
        import torch

        _package("zentorch")  # adds its backend to torch
        compiled: Callable[..., Any] = torch.compile(unet.forward, backend="zentorch")
        known: set[tuple[int, ...]] = set()

        def forward(sample: Tensor, *args: Any, **kwargs: Any) -> Any:
            before = time.perf_counter()
            result = compiled(sample, *args, **kwargs)
            if tuple(sample.shape) not in known:
                known.add(tuple(sample.shape))
                self.compiling = time.perf_counter() - before
            return result

        return forward


class StableDiffusionCpp:
    """stable-diffusion.cpp through stable-diffusion-cpp-python, with its flash attention and direct convolutions.

    It reads the checkpoint itself and makes a whole image: its phases are separated by its report of steps, of which
    the first begins when the text is encoded.
    """

    def __init__(self, setting: Setting) -> None:
        import torch

        package = _package("stable_diffusion_cpp")
        self.version = package.__version__
        self.setting, self.compiling = setting, 0.0
        self.watch = Stopwatch(torch.device("cpu"))
        self.model = package.StableDiffusion(
            model_path=setting.ckpt,
            wtype=setting.precision,
            n_threads=torch.get_num_threads(),
            diffusion_flash_attn=True,
            vae_decode_only=True,
            verbose=False,
        )

    @property
    def latents(self) -> tuple[int, int]:
        return 4, 8

    def facts(self) -> dict[str, Any]:
        return {"runs in": self.setting.precision, "stable-diffusion-cpp-python": self.version}

    def make(self, work: Work, noise: Tensor) -> list[Any]:
        """Makes the image of its own noise of the seed; it cannot be ended, so a limited run has as many steps."""
        started = self.watch.mark()
        self.watch.limit = 0

        def progress(step: int, steps: int, seconds: float) -> None:
            if step:
                self.watch.step()
            else:
                self.watch.began = self.watch.mark()

        images = self.model.generate_image(
            PROMPT.format(work.number),
            negative_prompt=f"{work.number}",
            width=work.size,
            height=work.size,
            cfg_scale=GUIDANCE,
            sample_method="ddim_trailing",
            sample_steps=work.limit or work.steps,
            seed=self.setting.seed,
            progress_callback=progress,
        )
        self.watch.spans["text"] = [(started, self.watch.began)]
        self.watch.spans["decode"] = [(self.watch.steps[-1], self.watch.mark())]
        return images

    def save(self, images: list[Any], outdir: Path) -> None:
        save_pillow(images, outdir)
