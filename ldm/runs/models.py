"""Chooses a run's model: config and checkpoint, LoRAs and textual inversions; and reads facts from the config.

Every fault is an `InputError` that names the option.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.checkpoints.configs import (
    BUNDLED_CKPT,
    BUNDLED_CONFIG,
    INPAINTING_CKPT,
    INPAINTING_CONFIG,
    LAION_CKPT,
    LAION_CONFIG,
    V1_CKPT,
    V1_CONFIG,
    config_for,
)
from ldm.files import check_there
from ldm.job import MODEL_ENDINGS
from ldm.places import find
from ldm.runs.options import RunOptions
from ldm.util import is_mapping, need, printable

if TYPE_CHECKING:
    from ldm.checkpoints.adapters.lora_files import LoraFiles

logger = logging.getLogger("ldm")

_NOT_DOWNLOADED = (
    "nothing is downloaded by name: download its .ckpt or .safetensors file, or its folder, and give that "
    f"with --ckpt, or link the file at {V1_CKPT}"
)


def choose_model(options: RunOptions) -> tuple[Path, Path]:
    """Returns existing config and checkpoint files: the user's, a published model's, or the bundled model's."""
    parts = ("vae", options.vae), ("text_encoder", options.text_encoder), ("upscaler", options.upscaler)
    for option, path in parts:
        if path is not None:
            check_there(path, f"give another --{option}")
    if options.upscaler is not None:
        from ldm.pipeline.upscaler import load_upscaler

        load_upscaler(options.upscaler)
    if options.config is None and options.ckpt is None and not options.laion400m:
        config, ckpt = _usual_model(options.inpaint)
        check_there(find(ckpt), "link a checkpoint there, or give one with --ckpt")
        return find(config), find(ckpt)
    if options.config is not None:
        check_there(find(options.config), "give another with --config")
    ckpt = find(options.ckpt) if options.ckpt is not None else _ckpt_of(options)
    check_there(ckpt, _NOT_DOWNLOADED if _is_hub_name(options.ckpt) else "give another with --ckpt")
    config = options.config or _config_of(ckpt)
    need(
        not options.laion400m or bool(options.config) or config == LAION_CONFIG,
        f"{printable(ckpt)} is not the LAION-400M model; leave --laion400m out, or give another with --ckpt",
    )
    if config == LAION_CONFIG:
        _check_vocabulary()
    return find(config), ckpt


def _is_hub_name(ckpt: str | None) -> bool:
    """Returns whether a missing checkpoint has a name of Hugging Face, such as CompVis/stable-diffusion-v1-4."""
    if ckpt is None or ckpt.endswith(MODEL_ENDINGS) or not re.fullmatch(r"[\w-]+/[\w.-]+", ckpt):
        return False
    return not find(ckpt.partition("/")[0]).is_dir()


def _usual_model(inpaint: bool) -> tuple[str, str]:
    if inpaint and os.path.lexists(find(INPAINTING_CKPT)):
        return INPAINTING_CONFIG, INPAINTING_CKPT
    if os.path.lexists(find(V1_CKPT)):
        return V1_CONFIG, V1_CKPT
    logger.info(
        "no Stable Diffusion weights at %s, so this is the bundled model, which draws coloured solids; "
        "to use v1: ln -s /path/to/sd-v1-4.ckpt %s (`ldm where` lists the places and the pages of the weights)",
        V1_CKPT,
        V1_CKPT,
    )
    return BUNDLED_CONFIG, BUNDLED_CKPT


def _ckpt_of(options: RunOptions) -> Path:
    """Returns the default checkpoint of a config; raises InputError if it does not exist."""
    from ldm.config import read_config

    if options.config is None:
        return find(LAION_CKPT)
    read_config(options.config, options.allow_targets)  # faults of the config are reported first
    usual = {V1_CONFIG: V1_CKPT, INPAINTING_CONFIG: INPAINTING_CKPT, BUNDLED_CONFIG: BUNDLED_CKPT}
    usual |= {LAION_CONFIG: LAION_CKPT}
    same = (
        ckpt for config, ckpt in usual.items() if find(config).resolve() == find(options.config).resolve()
    )
    ckpt = find(next(same, V1_CKPT))
    need(
        os.path.lexists(ckpt),
        f"--config {printable(options.config)} needs its checkpoint; give it with --ckpt",
    )
    return ckpt


def _config_of(ckpt: Path) -> str:
    """Returns the published config that a checkpoint needs, recognised by its content."""
    from ldm.checkpoints.model_files import read_model

    return config_for(read_model(ckpt).state_dict)


def _check_vocabulary() -> None:
    """Checks that the LAION-400M model's vocabulary exists, before the model is read."""
    from ldm.modules.encoders.bert import find_vocabulary

    find_vocabulary()


def find_loras(options: RunOptions) -> LoraFiles:
    """Returns the files and the folder in which LoRAs are found by name."""
    from ldm.checkpoints.adapters.lora_files import LoraFiles

    return LoraFiles([path for path, _, _ in options.lora], options.lora_dir)


def check_additions(options: RunOptions) -> None:
    """Checks that the files of LoRAs and textual inversions exist, else raises InputError."""
    for path, _, _ in options.lora if options.lora_dir is None else ():
        check_there(path, "give a file, or a folder that PEFT saved")
    for path, _ in options.embedding:
        check_there(path, "give another with --embedding")


def check_latents(options: RunOptions, model: Mapping[str, Any]) -> None:
    """Checks that --C and --f agree with the config."""
    channels = _param(model, "channels", options.channels)
    factor = latent_factor(model)
    need(
        channels == options.channels,
        f"--C is {options.channels}, but the model has {channels} latent channels",
    )
    need(
        factor == options.factor, f"--f is {options.factor}, but the model's downsampling factor is {factor}"
    )


def _param(model: Mapping[str, Any], name: str, default: int) -> int:
    from ldm.config import ConfigError, section

    value = section(model).get(name, default)
    if type(value) is not int:
        raise ConfigError(f"the config's {name} is {value!r}; it must be a whole number")
    return value


def latent_factor(model: Mapping[str, Any]) -> int:
    """Returns how many pixels one latent value spans along each side."""
    from ldm.config import ConfigError, section
    from ldm.models.autoencoder import downsampling

    ddconfig: Any = section(model, "first_stage_config").get("ddconfig") or {}
    if not is_mapping(ddconfig):
        raise ConfigError(f"the config's ddconfig is {ddconfig!r}; it must be a mapping")
    levels = ddconfig.get("ch_mult", [])
    if not isinstance(levels, list | tuple):
        raise ConfigError(f"the config's ddconfig.ch_mult is {levels!r}; it must be a list")
    return downsampling(ddconfig)


def begins_without_signal(model: Mapping[str, Any]) -> bool:
    """Returns whether a config's model was trained with zero terminal SNR."""
    from ldm.config import section

    return bool(section(model).get("zero_terminal_snr"))


def edits_images(model: Mapping[str, Any]) -> bool:
    """Returns whether a config's model sees an image that it edits, as InstructPix2Pix does."""
    return model.get("target") == "ldm.models.diffusion.ddpm.LatentEditDiffusion"


def own_side(model: Mapping[str, Any]) -> int:
    """Returns the side in pixels of the images that a config's model was trained for."""
    return _param(model, "image_size", 64) * latent_factor(model)
