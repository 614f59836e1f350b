"""Where the weights of a model's networks are while they run, and while they do not."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import nn

from ldm.checkpoints.formats.tensor_bytes import forget
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.diffusionmodules.adapter import T2IAdapter
from ldm.modules.diffusionmodules.controlnet import ControlNet
from ldm.modules.diffusionmodules.image_prompt import IPAdapter
from ldm.runtime.allocator import return_freed
from ldm.runtime.device import Precision
from ldm.runtime.packing import PackedFiles
from ldm.runtime.prepare import prepare, prepare_control

LOW_MEMORY = 200_000_000  # bytes of weights that stay in memory with `lowmem`


class Placement:
    """Brings a model to a precision, and with `lowmem` each of its networks to the device only while it runs.

    `packer` holds the weights that are packed for a CPU, None on other devices; `packed` keeps them for the next
    process. With `compiled` the U-Net is left to torch's compiler.
    """

    def __init__(
        self,
        model: LatentDiffusion,
        precision: Precision,
        lowmem: bool,
        compiled: bool,
        packed: PackedFiles | None = None,
    ) -> None:
        self.precision = precision
        self._model, self._lowmem = model, lowmem
        self.packer = prepare(
            model, precision.dtype, forget, LOW_MEMORY if lowmem else None, compiled, precision.int8, packed
        )

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self._model.device

    def add(self, network: ControlNet | T2IAdapter | IPAdapter) -> None:
        """Brings another network, that acts on the U-Net, to the precision and the device of the model.

        An adapter, which runs once for each image, stays in float32.
        """
        if not isinstance(network, ControlNet):
            network.float().to(self.device)
        else:
            precision = self.precision
            prepare_control(network, self.packer, self.device, precision.dtype, forget, precision.int8)

    def remove(self, network: nn.Module) -> None:
        """Frees what is packed of a network that was added."""
        if self.packer is not None:
            self.packer.drop(network)

    def make_room(self, idle: nn.Module) -> None:
        """Frees on a CPU what is packed of a network until it runs again, and what the allocator has kept."""
        if self.packer is not None:
            self.packer.drop(idle)
            return_freed()

    @contextmanager
    def running(self, network: nn.Module) -> Generator[None]:
        """Has `network` on the device, and runs it in the pipeline's precision."""
        with self.on_device(network), self.precision.context(self.device):
            yield

    @contextmanager
    def on_device(self, network: nn.Module) -> Generator[None]:
        """Has `network` on the device; with `lowmem`, frees its memory on exit."""
        if self._lowmem and self.packer is None:
            network.to(self.device)
        yield
        if self._lowmem:
            self._release(network)

    def _release(self, network: nn.Module) -> None:
        if self.packer is None:
            network.to("cpu")
        else:
            self.make_room(network)
