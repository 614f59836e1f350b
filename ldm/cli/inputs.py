"""From what was typed to what is run: options checked, prompts read, model and starting pictures found.

Every fault is an `InputError` that names the option.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli.options import (
    BUNDLED_CKPT,
    BUNDLED_CONFIG,
    INPAINTING_CKPT,
    INPAINTING_CONFIG,
    LAION_CKPT,
    LAION_CONFIG,
    V1_CKPT,
    V1_CONFIG,
)
from ldm.job import Init, Job, lora_name, split_loras
from ldm.util import InputError, find, printable

if TYPE_CHECKING:
    from ldm.checkpoints.lora_files import LoraFiles
    from ldm.images.canvas import Canvas

logger = logging.getLogger("ldm")

MAX_SEED = 2**32
MAX_COUNT = 100_000
MAX_UPSCALE = 8

_LAION_KEY = "cond_stage_model.transformer.token_emb.weight"  # of its text model, which is not CLIP's


def check_options(opt: argparse.Namespace) -> None:
    """Numbers in range and options that go together, else an `InputError` that names the option."""
    need(1 <= opt.ddim_steps <= 999, f"--ddim_steps is {opt.ddim_steps}; give 1 to 999")
    need(0 <= opt.seed < MAX_SEED, f"--seed is {opt.seed}; give 0 to {MAX_SEED - 1}")
    need(math.isfinite(opt.scale), f"--scale is {opt.scale}; give a finite number")
    need(math.isfinite(opt.ddim_eta) and opt.ddim_eta >= 0, f"--ddim_eta is {opt.ddim_eta}; give 0 to 1")
    for name in ("plms", "dpm_solver"):
        given = getattr(opt, name)
        need(
            not (given and opt.ddim_eta),
            f"--{name} adds no noise, so --ddim_eta {opt.ddim_eta} is impossible",
        )
    spaced = opt.timestep_spacing != "uniform"
    need(not (opt.dpm_solver and spaced), "--dpm_solver has uniform --timestep_spacing only")
    for name in ("n_iter", "n_samples"):
        need(1 <= getattr(opt, name) <= MAX_COUNT, f"--{name} is {getattr(opt, name)}; give 1 to {MAX_COUNT}")
    for name in ("strength", "upscale_strength"):
        need(0 <= getattr(opt, name) <= 1, f"--{name} is {getattr(opt, name)}; give 0 to 1")
    need(1 <= opt.upscale <= MAX_UPSCALE, f"--upscale is {opt.upscale}; give 1 to {MAX_UPSCALE}")
    need(0 <= opt.mask_blur <= 256, f"--mask_blur is {opt.mask_blur}; give 0 to 256 pixels")
    need(
        opt.safety != "off" or opt.safety_model is None,
        f"--safety off does not go with --safety_model {printable(opt.safety_model)}; leave one out",
    )
    need(min(opt.outpaint) >= 0, f"--outpaint is {opt.outpaint}; give four numbers of 0 or more")
    if opt.ddim_eta > 1:
        logger.warning("--ddim_eta %g is above 1: more noise than the method allows for", opt.ddim_eta)
    if opt.skip_grid and opt.skip_save:
        logger.warning("--skip_grid and --skip_save together: nothing will be written")


def need(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


def read_prompts(opt: argparse.Namespace) -> list[list[str]]:
    """The prompts of each batch: n_samples times the one, or the file's lines in batches of n_samples."""
    opt.negative_prompt = _text("--negative_prompt", opt.negative_prompt)
    if opt.from_file is None:
        return [[_text("--prompt", opt.prompt)] * opt.n_samples]
    from ldm.prompts.files import read_prompt_file

    prompts = read_prompt_file(opt.from_file)
    return [prompts[i : i + opt.n_samples] for i in range(0, len(prompts), opt.n_samples)]


def split_batches(opt: argparse.Namespace, batches: Sequence[Sequence[str]]) -> list[list[str]]:
    """The prompts of each batch, so that all of one batch ask for the same LoRAs."""
    if opt.lora_dir is None and any(split_loras(prompt)[1] for batch in batches for prompt in batch):
        logger.warning("without --lora_dir, <lora:...> in a prompt is text like any other")
    return [
        list(alike)
        for batch in batches
        for _, alike in itertools.groupby(batch, key=lambda prompt: read_loras(opt, prompt)[1])
    ]


def read_loras(opt: argparse.Namespace, prompt: str) -> tuple[str, tuple[tuple[str, float, float], ...]]:
    """A prompt as the model sees it, and the LoRAs of the options and the prompt."""
    given = tuple((lora_name(Path(path).name), weight, on_text) for path, weight, on_text in opt.lora)
    if opt.lora_dir is None:
        return prompt, given
    text, asked = split_loras(prompt)
    wrong = text.partition("<lora:")[1:]
    need(
        not any(wrong),
        f"{printable(''.join(wrong)[:60])} in a prompt is no <lora:NAME:WEIGHT> or <lora:NAME:TEXT:WEIGHT>",
    )
    return text, given + asked


def find_loras(opt: argparse.Namespace, batches: Sequence[Sequence[str]]) -> tuple[LoraFiles, list[str]]:
    """Where the run's LoRAs lie, and their names, all there."""
    from ldm.checkpoints.lora_files import LoraFiles

    files = LoraFiles([path for path, _, _ in opt.lora], opt.lora_dir)
    names = dict.fromkeys(name for batch in batches for name, _, _ in read_loras(opt, batch[0])[1])
    for name in names:
        files(name)
    for path, _ in opt.embedding:
        need(_exists(Path(path)), f"{printable(path)} does not exist; give another with --embedding")
    return files, list(names)


def _text(option: str, text: str) -> str:
    """A command-line text as UTF-8 even where the locale is ASCII, else an `InputError`."""
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError:
        raise InputError(f"{option} holds bytes that are not UTF-8: {printable(text)[:80]}") from None


def choose_model(opt: argparse.Namespace) -> tuple[Path, Path]:
    """Config and checkpoint, both there: the user's, a published one at its place, or the bundled model's."""
    for option, path in (("vae", opt.vae), ("text_encoder", opt.text_encoder)):
        need(
            path is None or _exists(Path(path)), f"{printable(path)} does not exist; give another --{option}"
        )
    if opt.config is None and opt.ckpt is None and not opt.laion400m:
        config, ckpt = _usual_model(opt.inpaint)
        return find(config), find(ckpt)
    ckpt = find(opt.ckpt or (LAION_CKPT if opt.laion400m else V1_CKPT))
    for option, path in (("config", opt.config), ("ckpt", ckpt)):
        need(
            path is None or _exists(find(path)),
            f"{printable(path)} does not exist; give another with --{option}",
        )
    config = opt.config or _config_of(ckpt)
    need(
        not opt.laion400m or opt.config or config == LAION_CONFIG,
        f"{printable(ckpt)} is not the LAION-400M model; leave --laion400m out, or give another with --ckpt",
    )
    if config == LAION_CONFIG:
        _check_vocabulary()
    return find(config), ckpt


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


def _config_of(ckpt: Path) -> str:
    """The published config that a checkpoint needs, told by its content."""
    from ldm.checkpoints.reader import read_model
    from ldm.checkpoints.recognise import is_inpainting_model

    state_dict = read_model(ckpt).state_dict
    if _LAION_KEY in state_dict:
        return LAION_CONFIG
    return INPAINTING_CONFIG if is_inpainting_model(state_dict) else V1_CONFIG


def _check_vocabulary() -> None:
    """That the LAION-400M model's vocabulary is there, before the model is read."""
    from ldm.modules.encoders.bert import find_vocabulary

    find_vocabulary()


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:
        raise InputError(f"cannot look at {printable(path)[:200]}: {error.strerror}") from None


def check_latents(opt: argparse.Namespace, model: Mapping[str, Any]) -> None:
    """That --C and --f are the config's."""
    channels = _param(model, "channels", opt.C)
    factor = _factor(model)
    need(channels == opt.C, f"--C is {opt.C}, but the model has {channels} latent channels")
    need(factor == opt.f, f"--f is {opt.f}, but the model's downsampling factor is {factor}")


def _param(model: Mapping[str, Any], name: str, default: int) -> int:
    from ldm.config import ConfigError, section

    value = section(model).get(name, default)
    if type(value) is not int:
        raise ConfigError(f"the config's {name} is {value!r}; it must be a whole number")
    return value


def _factor(model: Mapping[str, Any]) -> int:
    """How many pixels one latent value spans along each side."""
    from ldm.config import ConfigError, section

    levels = (section(model, "first_stage_config").get("ddconfig") or {}).get("ch_mult", (1, 2, 4, 4))
    if not isinstance(levels, list | tuple):
        raise ConfigError(f"the config's ddconfig.ch_mult is {levels!r}; it must be a list")
    return 2 ** (len(levels) - 1)


def own_side(model: Mapping[str, Any]) -> int:
    """The side in pixels of the pictures that a config's model was made for."""
    return _param(model, "image_size", 64) * _factor(model)


def check_size(opt: argparse.Namespace, model: Mapping[str, Any]) -> tuple[int, int]:
    """Width and height of a picture from text, by default the config's, checked against its factor."""
    factor = _factor(model)
    size = []
    for name in ("W", "H"):
        given = getattr(opt, name)
        side = own_side(model) if given is None else given
        below, above = side // factor * factor, -(-side // factor) * factor
        nearest = f"{below} or {above}" if below >= factor else str(max(above, factor))
        need(side > 0 and side % factor == 0, f"--{name} is {side}, no multiple of {factor}: use {nearest}")
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
    _note_size(starts, own_side(model))
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


def _note_size(starts: Sequence[Start], side: int) -> None:
    largest = max(starts, key=lambda start: start.width * start.height)
    if largest.width * largest.height > 2 * side * side:
        logger.info(
            "%dx%d is far from the %dx%d that this model was trained on, so subjects may repeat; "
            "--W and --H make a picture smaller",
            largest.width, largest.height, side, side,
        )  # fmt: skip


def check_memory(job: Job, model: Mapping[str, Any]) -> None:
    """Refuses a size whose denoising alone (ten float32 maps of the U-Net's first level) can never fit."""
    from ldm.config import section

    height, width = job.upscaled_size
    channels = section(model, "unet_config").get("model_channels", 320)
    needed = 10 * 4 * channels * height * width // _factor(model) ** 2
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
