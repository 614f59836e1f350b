"""Peers that run the U-Net of diffusers' pipeline on another runtime."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ldm.benchmark.subjects import Diffusers, Setting

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
        """Converts the U-Net in memory, for inputs of these shapes alone, and compiles it for the CPU."""
        import torch

        openvino = _package("openvino")

        class Bare(torch.nn.Module):
            def __init__(self, unet: torch.nn.Module) -> None:
                super().__init__()
                self.unet = unet

            def forward(self, sample: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
                return original(sample, timestep, context, return_dict=False)[0]

        unet = self.pipe.unet.float()
        fast, unet.forward = unet.forward, original
        try:
            model = openvino.convert_model(
                Bare(unet).eval(), example_input=tuple(inputs), input=[list(value.shape) for value in inputs]
            )
        finally:
            unet.forward = fast
            unet.to(self.dtype)
        if self._chosen == "int8":
            model = self._rounded(model, inputs)
        hints: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": OPENVINO_TYPES[self._chosen],
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        return openvino.Core().compile_model(model, "CPU", hints)

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
