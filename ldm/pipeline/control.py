"""The control networks of jobs: loaded once, with the features of their hints."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoints.adapters.control import ControlFile, control_file, network_of, read_control
from ldm.images.hints import read_hint
from ldm.job import Job
from ldm.models.diffusion.control import AnyUnit, FeatureUnit, ImageUnit, Unit, shares_of
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.diffusionmodules.adapter import T2IAdapter
from ldm.modules.diffusionmodules.controlnet import ControlNet
from ldm.modules.diffusionmodules.image_prompt import IPAdapter
from ldm.pipeline.image_prompt import see
from ldm.pipeline.placement import Placement
from ldm.pipeline.start_latents import OpenCanvas
from ldm.util import InputError, printable

_MOST_HINTS = 8
AnyNetwork = ControlNet | T2IAdapter | IPAdapter


@dataclass(frozen=True, eq=False)
class _Loaded:
    """A network in the pipeline's precision, and the LoRAs of the U-Net that its weights were added to, if any."""

    file: ControlFile
    network: AnyNetwork
    loras: tuple[tuple[str, float, float], ...]


class ControlNetworks:
    """Loads the control networks that jobs name, and reads their hints; both are kept.

    `canvases` opens the images that jobs start from; `find` gives the file of a name in `Job.controls`, which is by
    default its path.
    """

    def __init__(
        self,
        model: LatentDiffusion,
        placement: Placement,
        canvases: OpenCanvas,
        find: Callable[[str], Path] = control_file,
    ) -> None:
        self._model, self._placement, self._canvases, self._find = model, placement, canvases, find
        self._loaded: dict[str, _Loaded] = {}
        self.clear()

    def clear(self) -> None:
        """Forgets all networks and hints."""
        for loaded in self._loaded.values():
            self._placement.remove(loaded.network)
        self._loaded.clear()
        self._seen: dict[tuple[str, str], list[tuple[Tensor, Tensor]]] = {}
        self._features: dict[tuple[Any, ...], list[Tensor]] = {}

    def read(self, name: str, loras: tuple[tuple[str, float, float], ...] = ()) -> AnyNetwork:
        """The network of a name, loaded once; one of differences again for other LoRAs, which change their base."""
        loaded = self._loaded.get(name)
        if loaded is None or (loaded.file.is_difference and loaded.loras != loras):
            with torch.inference_mode(False):  # else what is packed of a mapped file could not leave memory
                file = read_control(self._find(name)) if loaded is None else loaded.file
                network = network_of(file, self._model.model.diffusion_model)
            if loaded is not None:
                self._placement.remove(loaded.network)
            self._placement.add(network)
            self._loaded[name] = _Loaded(file, network, loras)
            self._features.clear()
            self._seen.clear()
        return self._loaded[name].network

    def networks(self, job: Job) -> list[AnyNetwork]:
        """The networks of a job."""
        return [self.read(name, job.loras) for name, *_ in job.controls]

    @contextmanager
    def running(self, job: Job) -> Generator[None]:
        """Has the networks of a job on the device."""
        with ExitStack() as stack:
            for network in self.networks(job):
                stack.enter_context(self._placement.running(network))
            yield

    def units(self, job: Job, size: tuple[int, int]) -> tuple[AnyUnit, ...]:
        """The control of a pass of jobs like this one, of height and width `size`; within `running`."""
        return tuple(self._unit(job, control, size) for control in job.controls)

    def _unit(
        self, job: Job, control: tuple[str, str, float, float, float], size: tuple[int, int]
    ) -> AnyUnit:
        name, image, weight, *ends = control
        network, interval = self.read(name, job.loras), (ends[0], ends[1])
        if isinstance(network, IPAdapter):
            return ImageUnit(self._prompts(name, image, network), weight, interval)
        file, maps = self._loaded[name].file, self._maps(job, name, image, size)
        if isinstance(network, T2IAdapter):
            unet = self._model.model.diffusion_model
            blocks = range(unet.num_res_blocks, len(unet.input_blocks), unet.num_res_blocks + 1)
            return FeatureUnit({i: weight * one for i, one in zip(blocks, maps, strict=True)}, interval)
        shares = shares_of(job.control_mode, len(network.zero_convs) + 1, file.pools)
        return Unit(
            network,
            maps[0],
            [weight * share for share in shares],
            interval,
            alone=file.pools or job.control_mode in ("control", "guess"),
            pools=file.pools,
        )

    def _maps(self, job: Job, name: str, image: str, size: tuple[int, int]) -> list[Tensor]:
        """The maps that a network makes of a hint, the same at every step."""
        cropped = job.init is not None and job.init.crop_to_mask is not None
        masked = job.init if job.hint == "inpaint" or cropped else None
        key = name, image, size, job.hint, job.control_resize, job.seamless, masked
        if key not in self._features:
            network, hint = self._loaded[name].network, self._hint(job, image, size, self._loaded[name])
            assert not isinstance(network, IPAdapter)
            while len(self._features) >= _MOST_HINTS:
                self._features.pop(next(iter(self._features)))
            self._features[key] = (
                network(hint) if isinstance(network, T2IAdapter) else [network.read_hint(hint)]
            )
        return self._features[key]

    def _prompts(self, name: str, image: str, network: IPAdapter) -> list[tuple[Tensor, Tensor]]:
        """The keys and values that an IP-Adapter makes of no image and of an image, for each layer of the U-Net."""
        key = name, image
        if key not in self._seen:
            while len(self._seen) >= _MOST_HINTS:
                self._seen.pop(next(iter(self._seen)))
            dtype = self._placement.precision.dtype
            with torch.autocast(self._model.device.type, enabled=False):
                file, device = self._find(name), self._model.device
                made = network(see(file, image, network.reads_states, network.width, device))
            self._seen[key] = [(k.to(dtype), v.to(dtype)) for k, v in made]
        return self._seen[key]

    def _hint(self, job: Job, image: str, size: tuple[int, int], loaded: _Loaded) -> Tensor:
        hint = read_hint(job, image, size, self._canvases)
        if loaded.file.reversed_channels:
            hint = hint[..., ::-1].copy()
        network = loaded.network
        assert not isinstance(network, IPAdapter)
        channels = network.hint_channels
        if channels == 1:
            hint = hint.mean(2, keepdims=True)
        elif channels != hint.shape[2]:
            raise InputError(
                f"{printable(image)}: the network reads hints of {channels} channels; give another"
            )
        return torch.from_numpy(hint).permute(2, 0, 1)[None].to(self._model.device)
