"""Checks whether a model can make a job, and counts its steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ldm.files import check_there
from ldm.job import Job
from ldm.runs.models import begins_without_signal, latent_factor
from ldm.util import need


def check_job(job: Job, model: Mapping[str, Any], find_lora: Callable[[str], Path]) -> None:
    """Checks that a config's model can make a job, else raises InputError."""
    from ldm.models.diffusion.course import check_guidance
    from ldm.models.diffusion.passes import check_sampling

    check_sampling(job)
    check_guidance(job)
    factor = latent_factor(model)
    for name, side in (("--W", job.width), ("--H", job.height)):
        need(side % factor == 0, f"{name} is {side}, not a multiple of {factor}")
    check_memory(job, model)
    for name, _, _ in job.loras:
        check_there(find_lora(name), "give another LoRA")


def suit_to(model: Mapping[str, Any]) -> Callable[[Job], Job]:
    """Returns what gives a job the schedule that a config's model needs, if it chooses none."""
    if not begins_without_signal(model):
        return lambda job: job

    from ldm.models.diffusion.passes import begun_without_signal

    return begun_without_signal


def count_steps(job: Job) -> int:
    """Counts the denoising steps of a job, in both passes."""
    from ldm.models.diffusion.passes import passes_of

    return sum(one.steps for one in passes_of(job))


def check_syntax(job: Job) -> None:
    """Checks that a job's prompts in the web UI's syntax can be parsed, else raises InputError."""
    from ldm.prompts.editing import scripts_of
    from ldm.prompts.weights import parse_weights

    for text in {text for script in scripts_of(job) for text in script.texts()}:
        parse_weights(text)


def check_memory(job: Job, model: Mapping[str, Any]) -> None:
    """Refuses a size whose denoising alone (ten float32 maps of the U-Net's first level) can never fit."""
    import torch

    from ldm.config import section
    from ldm.runtime.memory import total_memory

    height, width = job.upscaled_size
    channels = section(model, "unet_config").get("model_channels", 320)
    needed = 10 * 4 * channels * height * width // latent_factor(model) ** 2
    total = total_memory(torch.device("cpu"))
    need(
        total is None or needed <= 4 * total,
        f"an image of {width}x{height} needs about {needed / 2**30:.0f} GiB, and this machine has "
        f"{(total or 0) / 2**30:.0f} GiB; use a smaller --W and --H",
    )
