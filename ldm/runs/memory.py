"""Estimates the memory of a plan, and refuses one that the machine cannot hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ldm.runs.added_costs import control_costs, upscaler_cost
from ldm.runs.estimate import Batch, batch_kinds
from ldm.runs.models import edits_images, latent_factor
from ldm.runs.options import RunOptions
from ldm.runs.plan import Plan
from ldm.util import InputError, printable

if TYPE_CHECKING:
    import torch

    from ldm.models.diffusion.ddpm import LatentDiffusion
    from ldm.runtime.device import Precision
    from ldm.runtime.estimate import NetworkWork

MOST_MAPS = 30  # of the finest level that a U-Net has at a time; v1's has 25
PROGRAM = 350 * 2**20  # bytes of Python, torch and their imports; measured on Linux


@dataclass(frozen=True)
class Memory:
    """Bytes of weights, and of activations at the peak; `peak` names the stage of the peak.

    `added` are the bytes of those of the weights that are not the model's, by the names of their files.
    """

    weights: int
    computed: float
    peak: str
    added: Mapping[str, int] = field(default_factory=dict[str, int])


def needed_memory(
    options: RunOptions,
    batches: Iterable[Batch],
    model: LatentDiffusion,
    work: NetworkWork,
    device: torch.device,
    precision: Precision,
) -> Memory:
    """Returns the peak memory of one device."""
    from ldm.models.diffusion.ddpm import LatentInpaintDiffusion
    from ldm.pipeline import LOW_MEMORY
    from ldm.runtime import tiling
    from ldm.runtime.estimate import weight_bytes

    def share(size: tuple[int, int]) -> float:
        return _share_at_once(options, model, size, device)

    batches, sees_image = list(batches), isinstance(model, LatentInpaintDiffusion)
    widths = model.first_stage_model.widths
    largest = max((batch.job.upscaled_size for batch in batches), key=_area)
    encoded = {batch.size for batch in batches if sees_image or batch.job.init is not None}
    encoded |= {batch.job.upscaled_size for batch in batches if batch.encodes_again}
    passing = {size: tiling.needed_memory(widths, _area(size)) * share(size) for size in {largest, *encoded}}
    to_encode = work.encode(*largest).alive / work.decode(*largest).alive  # always in float32
    costs = dict(control_costs((batch.job for batch in batches), work, precision))
    denoised = {
        (size, batch.samples, any(costs[file].runs_each_step for file, *_ in batch.job.controls))
        for batch in batches
        for size, steps, _ in batch.passes()
        if steps
    }

    if options.upscaler is not None:
        enlarged = max((batch.size if batch.job.upscale > 1 else largest for batch in batches), key=_area)
        costs[options.upscaler] = upscaler_cost(options.upscaler, enlarged)

    def maps(size: tuple[int, int], controlled: bool) -> int:
        return work.predict(*size).alive + (work.control(*size).alive if controlled else 0)

    peaks = [
        (passing[largest] * precision.dtype.itemsize / 4, f"decoding {_words(largest)}"),
        *((passing[size] * to_encode, f"encoding {_words(size)}") for size in encoded),
        *(
            (precision.dtype.itemsize * maps(size, controlled) * samples, f"denoising {_words(size)}")
            for size, samples, controlled in denoised
        ),
        *((cost.needed, cost.stage) for cost in costs.values()),
    ]
    packed = [*weight_bytes(model, precision, encodes=bool(encoded)).values()]
    packed += [cost.weights for cost in costs.values() if cost.runs_each_step]
    whole = [cost.weights for cost in costs.values() if not cost.runs_each_step]
    if not options.lowmem:
        added = {name: cost.weights for name, cost in costs.items()}
        return Memory(sum(packed) + sum(whole), *max(peaks), added)
    limit = LOW_MEMORY if device.type == "cpu" else max(packed)  # of what is there only while it runs
    return Memory(min(max(packed), limit) + sum(whole), *max(peaks))


def check_batches(
    options: RunOptions, plan: Plan, config: Mapping[str, Any], device: torch.device, precision: Precision
) -> None:
    """Refuses a run with a batch that exceeds this machine's memory; the `InputError` names what would fit.

    The estimate takes seconds, so it is made only if an upper bound is close to the available memory.
    """
    from ldm.checkpoints.load import build_model
    from ldm.config import section
    from ldm.runtime.estimate import NetworkWork
    from ldm.runtime.memory import total_memory

    total, batches = total_memory(device), batch_kinds(plan, edits=edits_images(config))
    width = section(config, "unet_config").get("model_channels", 320)
    cells = max(_area(size) * batch.samples for batch in batches for size, *_ in batch.passes())
    bound = MOST_MAPS * 4 * width * cells // latent_factor(config) ** 2
    adds = options.upscaler is not None or any(batch.job.controls for batch in batches)  # not in the bound
    if total is None or (2 * bound < total and not adds):
        return
    try:
        model = build_model(config)
        memory = needed_memory(options, batches, model, NetworkWork(model), device, precision)
    except RuntimeError:  # a network of another package may need its weights
        return
    too_much = beyond_memory(memory, device, max(batch.images for batch in batches))
    if too_much is not None:
        raise InputError(too_much)


def beyond_memory(memory: Memory, device: torch.device, images: int) -> str | None:
    """Returns the message for batches of up to `images` images that need more memory than there is; else None."""
    from ldm.runtime.memory import total_memory

    total, program = total_memory(device), program_bytes(device)
    needed = memory.weights + memory.computed + program
    if total is None or needed <= total:
        return None
    fitting = int(images * max(total - memory.weights - program, 0) / memory.computed)
    added = ", ".join(
        f"{_gib(size)} GiB of it {printable(name)[:100]}" for name, size in memory.added.items()
    )
    advice = (
        f"--n_samples {fitting} would fit"
        if 1 <= fitting < images
        else f"use a smaller --W and --H, {'fewer of these files, ' if added else ''}or --lowmem"
    )
    whose = "this machine" if device.type == "cpu" else f"{device}"
    return (
        f"{memory.peak} in batches of {images} needs about {_gib(needed)} GiB{f' ({added})' if added else ''}, "
        f"and {whose} has {_gib(total)} GiB; {advice}"
    )


def _gib(size: float) -> str:
    return f"{size / 2**30:.0f}" if size >= 10 * 2**30 else f"{size / 2**30:.2g}"


def program_bytes(device: torch.device) -> int:
    """Returns the bytes of everything that is not a tensor, from the memory that the tensors are in."""
    return PROGRAM if device.type == "cpu" else 0


def _share_at_once(
    options: RunOptions, model: LatentDiffusion, size: tuple[int, int], device: torch.device
) -> float:
    """Returns the fraction of an image that the autoencoder processes at a time: 1, or one tile's."""
    from ldm.runtime.memory import available_memory
    from ldm.runtime.tiling import choose_tile

    widths, factor = model.first_stage_model.widths, model.first_stage_model.downsampling
    tile = choose_tile(options.tiles, widths, factor, size, available_memory(device))
    return 1.0 if tile is None else min((tile * factor) ** 2 / _area(size), 1.0)


def _area(size: tuple[int, int]) -> int:
    return size[0] * size[1]


def _words(size: tuple[int, int]) -> str:
    height, width = size
    return f"{width}x{height}"
