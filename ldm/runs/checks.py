"""Checks whether a model can make a job, and counts its steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm.files import check_there
from ldm.job import Job
from ldm.runs.control_checks import check_control_files
from ldm.runs.models import begins_without_signal, edits_images, latent_factor, own_side
from ldm.util import need


def check_job(job: Job, model: Mapping[str, Any], find_lora: Callable[[str], Path]) -> None:
    """Checks that a config's model can make a job, else raises InputError."""
    from ldm.models.diffusion.control import check_control
    from ldm.models.diffusion.course import check_guidance
    from ldm.models.diffusion.passes import check_sampling

    check_sampling(job)
    check_guidance(job, edits_images(model))
    check_control(job)
    factor = latent_factor(model)
    for name, side in (("--W", job.width), ("--H", job.height)):
        need(side % factor == 0, f"{name} is {side}, not a multiple of {factor}")
    check_memory(job, model)
    check_seamless(job, model)
    check_shortcuts(job, model)
    for name, _, _ in job.loras:
        check_there(find_lora(name), "give another LoRA")
    check_control_files(job, own_side(model))


def check_seamless(job: Job, model: Mapping[str, Any]) -> None:
    """Checks that the maps of each level of the U-Net end where the image does, else raises InputError."""
    from ldm.config import section

    levels = len(section(model, "unet_config").get("channel_mult") or (1, 2, 4, 8))
    multiple = latent_factor(model) * 2 ** (levels - 1)
    for name, side, axes in (("--W", job.width, "x"), ("--H", job.height, "y")):
        need(
            job.seamless not in (axes, "both") or side % multiple == 0,
            f"--seamless {job.seamless} needs {name} in multiples of {multiple}, and it is {side}; "
            f"use {max(side // multiple, 1) * multiple}",
        )


def check_controls(names: Sequence[str], model: Mapping[str, Any]) -> None:
    """Checks that the control networks in these files are for a config's model, else raises InputError."""
    if not names:
        return
    from ldm.checkpoints.adapters.control import control_file, network_of, read_control
    from ldm.checkpoints.load import build_model

    unet = build_model(model).model.diffusion_model
    for name in names:
        network_of(read_control(control_file(name)), unet)


def suit_to(model: Mapping[str, Any]) -> Callable[[Job], Job]:
    """Returns what gives a job the schedule that a config's model needs, if it chooses none, and its start."""
    without_signal, edits = begins_without_signal(model), edits_images(model)
    if not (without_signal or edits):
        return lambda job: job

    from ldm.models.diffusion.passes import begun_from_noise, begun_without_signal

    def suited(job: Job) -> Job:
        job = begun_without_signal(job) if without_signal else job
        return begun_from_noise(job) if edits else job

    return suited


def check_shortcuts(job: Job, model: Mapping[str, Any]) -> None:
    """Checks that a config's U-Net can do without the products that a job leaves out, else raises InputError."""
    if job.is_exact:
        return
    from ldm.config import section
    from ldm.runtime.shortcuts import check_branch

    ours = section(model)["unet_config"].get("target", "").startswith("ldm.")
    unet = section(model, "unet_config")
    each, levels = unet.get("num_res_blocks", 0) + 1, len(unet.get("channel_mult", (1, 2, 4, 8)))
    check_branch((*job.cache_steps, 0, 0)[1], each * levels if ours else 0)


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
