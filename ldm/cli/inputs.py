"""From what was typed to what is run: options checked, prompts read, model and starting pictures found.

Every fault is an `InputError` that names the option.
"""

from __future__ import annotations

import argparse
import errno
import functools
import logging
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from ldm.checkpoints.configs import (
    BUNDLED_CKPT,
    BUNDLED_CONFIG,
    INPAINTING_CONFIG,
    LAION_CONFIG,
    V1_CONFIG,
    config_for,
)
from ldm.cli.effects import warn_of_options_without_effect
from ldm.cli.options import INPAINTING_CKPT, LAION_CKPT, V1_CKPT
from ldm.fields import OWN_NAMES, SETTINGS
from ldm.job import MODEL_ENDINGS, Init, Job, Sampler
from ldm.places import find
from ldm.prompts.lines import MAX_COUNT
from ldm.util import InputError, printable, read_side_file

if TYPE_CHECKING:
    from ldm.checkpoints.adapters.lora_files import LoraFiles
    from ldm.images.canvas import Canvas

logger = logging.getLogger("ldm")

BUNDLED_CARD = "models/ldm/shapes/README.md"
RANDOM = -1  # the --seed that asks for any
_PLMS_STEPS = 25  # below it PLMS, whose first steps are of lower order, draws much wrong
_MOST_WORDS = 10
_NOT_DOWNLOADED = (
    "nothing is downloaded by name: download its .ckpt or .safetensors file, or its folder, and give that "
    f"with --ckpt, or link the file at {V1_CKPT}"
)

# options that set a field of every job, by the field whose range holds for them
_CHECKED = {name: OWN_NAMES.get(name, name) for name in (
    "ddim_steps", "seed", "scale", "ddim_eta", "strength", "upscale", "upscale_strength", "mask_blur", "outpaint",
)}  # fmt: skip


def check_options(opt: argparse.Namespace) -> None:
    """Numbers in range and options that go together, else an `InputError` that names the option."""
    chosen_sampler(opt)
    if opt.from_file == "-" and sys.stdin is not None and sys.stdin.isatty():
        logger.info("reading prompts from this terminal: one a line, then Ctrl-D")
    for name, field in _CHECKED.items():
        try:
            SETTINGS[field].check(getattr(opt, name))
        except ValueError as error:
            raise InputError(f"--{name} {error}") from None
    for name in ("n_iter", "n_samples", "images_per_prompt"):
        count = getattr(opt, name)
        need(count is None or 1 <= count <= MAX_COUNT, f"--{name} is {count}; give 1 to {MAX_COUNT}")
    need(
        opt.safety != "off" or opt.safety_model is None,
        f"--safety off does not go with --safety_model {printable(opt.safety_model)}; leave one out",
    )
    warn_of_options_without_effect(opt)
    if opt.n_rows < 0:
        logger.warning("--n_rows %d is below 0; the default is used", opt.n_rows)
    if opt.n_iter > 1 and any(axis.startswith("seed=") for axis in opt.sweep):
        logger.warning("--sweep seed with --n_iter %d makes the same images %d times", opt.n_iter, opt.n_iter)
    if opt.skip_grid and opt.skip_save:
        logger.warning("--skip_grid and --skip_save together: nothing will be written")
    if opt.sweep and opt.skip_save:
        logger.warning(
            "with --skip_save, --sweep makes no labelled sheet, which is made from the images' files"
        )


def check_additions(opt: argparse.Namespace) -> None:
    """That the files of LoRAs and textual inversions are there, else an `InputError`."""
    for path, _, _ in opt.lora if opt.lora_dir is None else ():
        check_there(path, "give a file, or a folder that PEFT saved")
    for path, _ in opt.embedding:
        check_there(path, "give another with --embedding")


def chosen_sampler(opt: argparse.Namespace) -> Sampler:
    """The sampler that --sampler or a switch asks for."""
    switches: list[Sampler] = [name for name in get_args(Sampler) if getattr(opt, name, False)]
    for name in switches:
        need(
            opt.sampler in (None, name),
            f"--{name} and --sampler {opt.sampler} contradict; leave one of them out",
        )
    return opt.sampler or (switches or ["ddim"])[0]


def need(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


def find_loras(opt: argparse.Namespace) -> LoraFiles:
    """Where the run's LoRAs are found."""
    from ldm.checkpoints.adapters.lora_files import LoraFiles

    return LoraFiles([path for path, _, _ in opt.lora], opt.lora_dir)


def choose_model(opt: argparse.Namespace) -> tuple[Path, Path]:
    """Config and checkpoint, both there: the user's, a published one at its place, or the bundled model's."""
    for option, path in (("vae", opt.vae), ("text_encoder", opt.text_encoder)):
        if path is not None:
            check_there(path, f"give another --{option}")
    if opt.config is None and opt.ckpt is None and not opt.laion400m:
        config, ckpt = _usual_model(opt.inpaint)
        check_there(find(ckpt), "link a checkpoint there, or give one with --ckpt")
        return find(config), find(ckpt)
    if opt.config is not None:
        check_there(find(opt.config), "give another with --config")
    ckpt = find(opt.ckpt) if opt.ckpt is not None else _ckpt_of(opt)
    check_there(ckpt, _NOT_DOWNLOADED if _is_hub_name(opt.ckpt) else "give another with --ckpt")
    config = opt.config or _config_of(ckpt)
    need(
        not opt.laion400m or opt.config or config == LAION_CONFIG,
        f"{printable(ckpt)} is not the LAION-400M model; leave --laion400m out, or give another with --ckpt",
    )
    if config == LAION_CONFIG:
        _check_vocabulary()
    return find(config), ckpt


def _is_hub_name(ckpt: str | None) -> bool:
    """Whether a checkpoint that is not there is named as on Hugging Face, such as CompVis/stable-diffusion-v1-4."""
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
        "to use v1: ln -s /path/to/sd-v1-4.ckpt %s",
        V1_CKPT,
        V1_CKPT,
    )
    return BUNDLED_CONFIG, BUNDLED_CKPT


def _ckpt_of(opt: argparse.Namespace) -> Path:
    """Where the checkpoint of a config lies if none is given; an InputError if nothing is there."""
    from ldm.config import read_config

    if opt.config is None:
        return find(LAION_CKPT)
    read_config(opt.config, opt.allow_targets)  # what is wrong with it is said first
    usual = {V1_CONFIG: V1_CKPT, INPAINTING_CONFIG: INPAINTING_CKPT, BUNDLED_CONFIG: BUNDLED_CKPT}
    usual |= {LAION_CONFIG: LAION_CKPT}
    same = (ckpt for config, ckpt in usual.items() if find(config).resolve() == find(opt.config).resolve())
    ckpt = find(next(same, V1_CKPT))
    need(os.path.lexists(ckpt), f"--config {printable(opt.config)} needs its checkpoint; give it with --ckpt")
    return ckpt


def _config_of(ckpt: Path) -> str:
    """The published config that a checkpoint needs, told by its content."""
    from ldm.checkpoints.model_files import read_model

    return config_for(read_model(ckpt).state_dict)


def _check_vocabulary() -> None:
    """That the LAION-400M model's vocabulary is there, before the model is read."""
    from ldm.modules.encoders.bert import find_vocabulary

    find_vocabulary()


def check_there(path: str | Path, cure: str) -> None:
    """That there is something at a path, and that it can be read; else an InputError that says what to do."""
    shown = printable(path)[:200]
    try:
        os.stat(path)
        if not os.access(path, os.R_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except (FileNotFoundError, NotADirectoryError):
        broken = f"is a broken link to {printable(os.readlink(path))}" if os.path.islink(path) else None
        raise InputError(f"{shown} {broken or 'does not exist'}; {cure}") from None
    except (OSError, ValueError) as error:  # no permission, a loop of links, a name that no file can have
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{shown} cannot be read: {reason}; {cure}") from None


def check_latents(opt: argparse.Namespace, model: Mapping[str, Any]) -> None:
    """That --C and --f are the config's."""
    channels = _param(model, "channels", opt.C)
    factor = latent_factor(model)
    need(channels == opt.C, f"--C is {opt.C}, but the model has {channels} latent channels")
    need(factor == opt.f, f"--f is {opt.f}, but the model's downsampling factor is {factor}")


def _param(model: Mapping[str, Any], name: str, default: int) -> int:
    from ldm.config import ConfigError, section

    value = section(model).get(name, default)
    if type(value) is not int:
        raise ConfigError(f"the config's {name} is {value!r}; it must be a whole number")
    return value


def latent_factor(model: Mapping[str, Any]) -> int:
    """How many pixels one latent value spans along each side."""
    from ldm.config import ConfigError, section
    from ldm.models.autoencoder import downsampling

    ddconfig = section(model, "first_stage_config").get("ddconfig") or {}
    if not isinstance(ddconfig, Mapping):
        raise ConfigError(f"the config's ddconfig is {ddconfig!r}; it must be a mapping")
    levels = ddconfig.get("ch_mult", [])
    if not isinstance(levels, list | tuple):
        raise ConfigError(f"the config's ddconfig.ch_mult is {levels!r}; it must be a list")
    return downsampling(ddconfig)


def own_side(model: Mapping[str, Any]) -> int:
    """The side in pixels of the pictures that a config's model was made for."""
    return _param(model, "image_size", 64) * latent_factor(model)


def check_size(opt: argparse.Namespace, model: Mapping[str, Any]) -> tuple[int, int]:
    """Width and height of a picture from text, by default the config's, checked against its factor."""
    factor = latent_factor(model)
    size = []
    for name in ("W", "H"):
        given = getattr(opt, name)
        side = own_side(model) if given is None else given
        below, above = side // factor * factor, -(-side // factor) * factor
        nearest = f"{below} or {above}" if below >= factor else str(max(above, factor))
        need(side > 0, f"--{name} is {side}; give a multiple of {factor}, at least {factor}")
        need(side % factor == 0, f"--{name} is {side}, not a multiple of {factor}; use {nearest}")
        size.append(side)
    return size[0], size[1]


@dataclass(frozen=True)
class Start:
    """What the jobs of one picture, or of none, have in common: the picture and their size in pixels."""

    init: Init | None
    width: int
    height: int


class Canvases:
    """Opens the pictures that jobs start from; the last few are kept. One that changes during a run is refused."""

    def __init__(self, mask_needed: bool) -> None:
        from ldm.images.canvas import open_canvas

        self._open = functools.lru_cache(maxsize=8)(functools.partial(open_canvas, mask_needed=mask_needed))
        self._digests: dict[Init, tuple[str, str]] = {}

    def __call__(self, init: Init) -> Canvas:
        canvas = self._open(init)
        first = self._digests.setdefault(init, (canvas.digest, canvas.mask_digest))
        for path, then, now in zip(
            (init.image, init.mask), first, (canvas.digest, canvas.mask_digest), strict=True
        ):
            need(then == now, f"{printable(path)} has changed since this run began; start again")
        return canvas


def read_starts(
    opt: argparse.Namespace, model: Mapping[str, Any], canvases: Callable[[Init], Canvas]
) -> list[Start]:
    """Where the jobs start: each picture, brought to size, or text alone."""
    if not (opt.init_img or opt.indir):
        need(not opt.inpaint, "give a picture with --init-img, or a folder of pairs with --indir")
        return [Start(None, *check_size(opt, model))]
    starts = []
    for init in _inits(opt):
        canvas = canvases(init)
        for note in canvas.notes:
            logger.info("%s: %s", printable(init.image), note)
        height, width, _ = canvas.pixels.shape
        starts.append(Start(init, width, height))
    return starts


def _inits(opt: argparse.Namespace) -> list[Init]:
    from ldm.images.canvas import find_images, find_pairs

    need(not (opt.indir and (opt.init_img or opt.mask)), "--indir goes without --init-img and --mask")
    pairs = (
        find_pairs(opt.indir) if opt.indir else [(path, opt.mask or "") for path in find_images(opt.init_img)]
    )
    resize = opt.resize or ("none" if opt.W is opt.H is None else "fit" if None in (opt.W, opt.H) else "fill")
    return [
        Init(
            image=image,
            width=opt.W,
            height=opt.H,
            resize=resize,
            background=opt.background,
            outpaint=opt.outpaint,
            mask=mask,
            alpha_mask=opt.inpaint and not mask,
            invert_mask=opt.invert_mask,
            mask_blur=opt.mask_blur,
        )
        for image, mask in pairs
    ]


def note_jobs(jobs: Iterable[Job], model: Mapping[str, Any]) -> None:
    """Prints what a model will not do well of what is asked of it: sizes, few steps, words that it does not know."""
    side, words = own_side(model), _known_words(model)
    largest, few, unknown = (0, 0), None, dict[str, None]()
    for job in jobs:
        largest = max(largest, job.upscaled_size, key=math.prod)
        few = job.steps if few is None and job.sampler == "plms" and job.steps < _PLMS_STEPS else few
        if words is not None and len(unknown) <= _MOST_WORDS:
            unknown |= dict.fromkeys(
                w for w in re.findall(r"[^\W\d_]+", job.prompt.lower()) if w not in words
            )
    if math.prod(largest) > 2 * side * side:
        logger.info(
            "this model was trained at %dx%d; at %dx%d objects may repeat", side, side, *reversed(largest)
        )
    if few is not None:
        logger.info(
            "PLMS needs about 50 steps, not %d; --dpm_solver gives good images in 10 to 20 steps, DDIM in 25",
            few,
        )
    if unknown:
        named = ", ".join(printable(word) for word in list(unknown)[:_MOST_WORDS])
        more = ", ..." if len(unknown) > _MOST_WORDS else ""
        logger.info(
            "the bundled model does not know: %s%s (%s lists what it draws)", named, more, BUNDLED_CARD
        )


def _known_words(model: Mapping[str, Any]) -> frozenset[str] | None:
    """The words that a model was taught, if its vocabulary's folder lists them; None for all others."""
    from ldm.config import section

    version = section(model, "cond_stage_config").get("version")
    path = find(version) / "words.txt" if isinstance(version, str) else None
    if path is None or not path.is_file():
        return None
    return frozenset(read_side_file(path, 1_000_000).decode("utf-8").split())


def check_memory(job: Job, model: Mapping[str, Any]) -> None:
    """Refuses a size whose denoising alone (ten float32 maps of the U-Net's first level) can never fit."""
    from ldm.config import section

    height, width = job.upscaled_size
    channels = section(model, "unet_config").get("model_channels", 320)
    needed = 10 * 4 * channels * height * width // latent_factor(model) ** 2
    total = _total_memory()
    need(
        total is None or needed <= 4 * total,
        f"an image of {width}x{height} needs about {needed / 2**30:.0f} GiB; this machine has "
        f"{(total or 0) / 2**30:.0f} GiB; use a smaller --W and --H",
    )


def _total_memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
