"""The control networks of jobs: loaded once, with the features of their hints."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from ldm.checkpoints.adapters.control import ControlFile, control_file, control_network, read_control
from ldm.images.canvas import open_canvas
from ldm.images.hints import read_hint
from ldm.job import Job
from ldm.models.diffusion.control import Unit, shares_of
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.diffusionmodules.controlnet import ControlNet
from ldm.pipeline.placement import Placement
from ldm.pipeline.starts import OpenCanvas
from ldm.util import InputError


@dataclass(frozen=True, eq=False)
class _Loaded:
    """A network in the pipeline's precision, and the LoRAs of the U-Net that its weights were added to, if any."""

    file: ControlFile
    network: ControlNet
    loras: tuple[tuple[str, float, float], ...]


class ControlNetworks:
    """Loads the control networks that jobs name, and reads their hints; both are kept.

    `find` gives the file of a name in `Job.controls`; by default the name is its path.
    """

    def __init__(
        self, model: LatentDiffusion, placement: Placement, find: Callable[[str], Path] = control_file
    ) -> None:
        self._model, self._placement, self._find = model, placement, find
        self._loaded: dict[str, _Loaded] = {}
        self.clear(None)

    def clear(self, canvases: OpenCanvas | None) -> None:
        """Forgets all hints; from now on `canvases` opens their images, or if it is None `open_canvas`."""
        self._canvas = lru_cache(maxsize=8)(open_canvas) if canvases is None else canvases
        self._features: dict[tuple[str, Job], Tensor] = {}

    def read(self, name: str, loras: tuple[tuple[str, float, float], ...] = ()) -> ControlNet:
        """The network of a name, loaded once; one of differences again for other LoRAs, which change their base."""
        loaded = self._loaded.get(name)
        if loaded is None or (loaded.file.is_difference and loaded.loras != loras):
            file = read_control(self._find(name)) if loaded is None else loaded.file
            network = control_network(file, self._model.model.diffusion_model)
            self._placement.add(network)
            self._loaded[name] = _Loaded(file, network, loras)
            self._features.clear()
        return self._loaded[name].network

    def networks(self, job: Job) -> list[ControlNet]:
        """The networks of a job."""
        return [self.read(name, job.loras) for name, *_ in job.controls]

    @contextmanager
    def running(self, job: Job) -> Iterator[None]:
        """Has the networks of a job on the device."""
        with ExitStack() as stack:
            for network in self.networks(job):
                stack.enter_context(self._placement.running(network))
            yield

    def units(self, job: Job, size: tuple[int, int]) -> tuple[Unit, ...]:
        """The control of a pass of jobs like this one, of height and width `size`; within `running`."""
        return tuple(self._unit(job, control, size) for control in job.controls)

    def _unit(self, job: Job, control: tuple[str, str, float, float, float], size: tuple[int, int]) -> Unit:
        name, image, weight, *interval = control
        network, file = self.read(name, job.loras), self._loaded[name].file
        key = name, replace(job, prompt="", negative_prompt="", seed=0, controls=((name, image, 0.0, *size),))
        if key not in self._features:
            while len(self._features) >= 8:
                self._features.pop(next(iter(self._features)))
            self._features[key] = network.read_hint(self._hint(job, image, size, file))
        maps = len(network.zero_convs) + 1
        shares = shares_of(job.control_mode, maps, file.pools)
        return Unit(
            network,
            self._features[key],
            [weight * share for share in shares],
            (interval[0], interval[1]),
            alone=file.pools or job.control_mode in ("control", "guess"),
            pools=file.pools,
        )

    def _hint(self, job: Job, image: str, size: tuple[int, int], file: ControlFile) -> Tensor:
        hint = read_hint(job, image, size, self._canvas)
        if file.reversed_channels:
            hint = hint[..., ::-1].copy()
        channels = file.weights["input_hint_block.0.weight"].shape[1]
        if channels != hint.shape[2]:
            raise InputError(f"a ControlNet of hints with {channels} channels takes no images; give another")
        return torch.from_numpy(hint).permute(2, 0, 1)[None].to(self._model.device)
