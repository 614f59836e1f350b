"""The costs of networks that a run has besides its model: control networks, and one that enlarges images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ldm.job import Job

if TYPE_CHECKING:
    from ldm.runtime.device import Precision
    from ldm.runtime.estimate import NetworkWork


@dataclass(frozen=True)
class Cost:
    """Bytes of a network's weights, and of what else it needs outside of the steps, in its own `stage` of a run.

    A ControlNet `runs_each_step`; adapters run once for an image.
    """

    weights: int
    needed: int = 0
    stage: str = ""
    runs_each_step: bool = False


def control_costs(jobs: Iterable[Job], work: NetworkWork, precision: Precision) -> Mapping[str, Cost]:
    """Returns the costs of the control networks of jobs by the names of their files, counted from what these hold.

    Adapters and the image encoder are in float32, ControlNets as `prepare_control` has them.
    """
    names = dict.fromkeys(file for job in jobs for file, *_ in job.controls)
    return {name: _control_cost(name, work, precision) for name in names}


def _control_cost(name: str, work: NetworkWork, precision: Precision) -> Cost:
    from ldm.checkpoints.adapters.control import control_file, read_control
    from ldm.checkpoints.formats.read import read_checkpoint
    from ldm.checkpoints.image_encoder import encoder_folder, encoder_weights

    path = control_file(name)
    file = read_control(path)
    numbers = sum(tensor.numel() for tensor in file.weights.values())
    if file.is_image_prompt:
        weights = read_checkpoint(encoder_weights(encoder_folder(path))).state_dict.values()
        encoder = 4 * sum(tensor.numel() for tensor in weights)
        return Cost(4 * numbers, encoder, "reading images for an IP-Adapter")
    if file.is_adapter:
        return Cost(4 * numbers)
    return Cost(work.control_bytes(precision), runs_each_step=True)


def upscaler_cost(file: str, size: tuple[int, int]) -> Cost:
    """Returns the cost of the network in a file for images of this height and width."""
    from ldm.pipeline.upscaler import load_upscaler

    upscaler = load_upscaler(file)
    return Cost(upscaler.weight_bytes, upscaler.needed_memory(size), f"enlarging {size[1]}x{size[0]}")
