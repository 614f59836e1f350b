"""The fields of a job: one table, read by options, prompt lists, sweeps, metadata, replay and checks.

A new field is a line of `ldm.job.Job` (or `Init`), a row of `FIELDS`, and the code that uses it. A job's values
are read and changed by `ldm.job_values`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ldm.field import INIT, Field, Switch
from ldm.former import moved
from ldm.job import MAX_CONTROLS, Init, Job, control_text, split_control
from ldm.models.diffusion.schedules import LISTS, SCHEDULES
from ldm.models.diffusion.solvers.names import (
    SCHEDULE_LABELS,
    SOLVER_LABELS,
    WITH_SCHEDULE,
    advice,
    spell_schedule,
    spell_solver,
)
from ldm.models.diffusion.solvers.registry import JOB_SETTINGS, SOLVERS
from ldm.seeds import MAX_SEEDS
from ldm.setting import Choices, Setting

MAX_TEXT = 65_536  # characters
MAX_LORAS = 100
_MAX_SIDE = 65_536
_GENERATORS = {"philox": "NV", "cpu": "CPU", "device": "GPU", "numpy": "NumPy"}  # A1111's names
SIZE = ("width", "height")
# the groups of options, and of fields, that only a job with a starting image has, one with a mask, one with a control
START, MASK, CONTROL = "start", "mask", "control"


# in the order of the entries in an image's text
FIELDS: tuple[Field, ...] = (
    Field("prompt", {"high": MAX_TEXT}, "prompt", "prompt", "TEXT", "what to draw"),
    Field("negative_prompt", {"high": MAX_TEXT}, "negative_prompt", "prompt", "TEXT", "what to keep away from"),
    Field(
        "steps", {"low": 1, "high": 999}, "ddim_steps", "sampling", "N", "denoising steps, 1 to 999",
        label="Steps", always=True,
    ),
    Field(
        "sampler", {}, "sampler", "sampling",
        help=f"how noise is removed step by step (default: ddim, or that of a switch; {advice()})",
        switches=(
            Switch("plms", "plms", "the same as --sampler plms"),
            Switch("dpm_solver", "dpm_solver", "the same as --sampler dpm_solver"),
        ),
        unset=True, label="Sampler", words=SOLVER_LABELS, always=True,
        choices=Choices(SOLVERS, WITH_SCHEDULE), spell=spell_solver,
    ),
    Field(
        "scale", {}, "scale", "sampling", "X", "guidance scale; 1 turns guidance off",
        label="CFG scale", always=True,
    ),
    Field(
        "seed", {"low": 0, "high": max(MAX_SEEDS.values())}, "seed", "sampling", "N",
        "seed of the first image, of up to 64 bits for --rng philox and cpu and 32 for the others; random or -1: any",
        label="Seed", always=True,
    ),
    Field("width", {"low": 8, "high": _MAX_SIDE, "multiple": 8}, "W", "size", "N", "width in pixels", unset=True),
    Field("height", {"low": 8, "high": _MAX_SIDE, "multiple": 8}, "H", "size", "N", "height in pixels", unset=True),
    # The web UI writes GPU where the sampling device draws the noise, and NV where CUDA's Philox noise is computed on
    # another. A text without RNG is read as NV: as a rule its noise was drawn on a CUDA device, and philox reproduces
    # that on every machine.
    Field(
        "rng", {}, "rng", "sampling",
        help="philox: the noise of a CUDA device, on any device; cpu, device: torch's generator there; numpy: "
        "NumPy's, as in the published inpainting app",
        label="RNG", words=_GENERATORS, always=True,
    ),
    Field(
        "schedule", {}, "schedule", "sampling",
        help="which levels of noise the steps visit; auto: those that the sampler was published with",
        label="Schedule type", words=SCHEDULE_LABELS,
        choices=Choices(("auto", *(name for name in SCHEDULES if name not in LISTS)), ()), spell=spell_schedule,
    ),
    Field(
        "sigmas", {"low": 0, "high": 1000}, "sigmas", "sampling", "S1,S2,...",
        "the levels themselves, as noise over signal, falling; the last step ends at 0", label="Sigmas",
    ),
    Field(
        "timesteps", {"low": 0, "high": 1000}, "timesteps", "sampling", "T1,T2,...",
        "the levels as timesteps, falling", label="Timesteps",
    ),
    Field(
        "eta", {"low": 0, "high": 10}, JOB_SETTINGS["eta"].option, "sampling", "X",
        "share of fresh noise in each step, 0 to 1 (default: the sampler's own: none for ddim, 1 for ancestral ones)",
        label="Eta DDIM",
    ),
    Field(
        "s_noise", {"low": 0, "high": 10}, JOB_SETTINGS["s_noise"].option, "sampling", "X",
        "factor of the fresh noise", label="Sigma noise",
    ),
    Field(
        "s_churn", {"low": 0, "high": 1000}, JOB_SETTINGS["s_churn"].option, "sampling", "X",
        "noise that euler, heun and dpm2 add before steps, spread over all of them", label="Sigma churn",
    ),
    Field(
        "convention", {}, "convention", "sampling",
        help="whose details hold where programs differ (the first noise, whole timesteps, steps of img2img)",
        label="Convention",
    ),
    Field(
        "step_noise", {}, "step_noise", "sampling",
        help="where the fresh noise of steps comes from: stream, that of the image goes on; brownian: one path for "
        "any number of steps (auto: with --convention a1111 or comfyui brownian for dpmpp_sde and the like)",
        label="Step noise",
    ),
    Field(
        "step_rng", {}, "step_rng", "sampling",
        help="the generator of that noise, if it is another one than --rng", label="Step RNG",
        words=_GENERATORS,
    ),
    Field(
        "step_seed_delta", {"low": 0, "high": 2**32 - 1}, "step_seed_delta", "sampling", "N",
        "added to the seed of that noise, where it is a stream: A1111's ENSD", label="ENSD",
    ),
    Field(
        "timestep_spacing", {}, "timestep_spacing", "sampling",
        help="which timesteps are visited; compvis gives the original's list, which can be longer than asked",
        label="Timestep spacing",
    ),
    Field(
        "seed_mode", {}, "seed_mode", "sampling",
        help="image: image i has seed + i and does not depend on the others; batch: one stream, as in the original",
        label="Seed mode", of_run=True,
    ),
    Field("batch_index", {"low": 0}, label="Batch index", of_run=True),
    Field(
        "strength", {"low": 0, "high": 1}, "strength", START, "X",
        "how much changes: the share of the steps that run, 0 (nothing) to 1 (everything)",
        label="Denoising strength",
    ),
    Field(
        "posterior", {}, group=START,
        switches=(
            Switch(
                "posterior_mean", "mean",
                "encode an image to the mean of its latent distribution instead of a draw from it",
            ),
        ),
        label="Posterior",
    ),
    Field(
        "init.image", {}, "init-img", START, "FILE",
        "images to start from: PNG, JPEG, WebP, BMP or TIFF files, or folders of them",
        label="Init image", is_file=True,
    ),
    Field("init.width", {"low": 1, "high": _MAX_SIDE}, label="Init width"),
    Field("init.height", {"low": 1, "high": _MAX_SIDE}, label="Init height"),
    Field(
        "init.resize", {}, "resize", START,
        help="how an image becomes --W by --H: fit inside, fill and crop, stretch, or pad "
        "(default: fill; with only one of --W and --H: fit; without: none)",
        unset=True, label="Resize",
    ),
    Field(
        "init.background", {}, "background", START, "COLOUR",
        "what shows through transparency and pads: a name or #rrggbb", label="Background",
    ),
    Field(
        "init.outpaint", {"low": 0, "high": _MAX_SIDE}, "outpaint", MASK, "L,T,R,B",
        "add this many pixels at the left, top, right and bottom", label="Outpaint",
    ),
    Field(
        "init.mask", {}, "mask", MASK, "FILE", "white is repainted (default: where the image is transparent)",
        unset=True, label="Mask", is_file=True,
    ),
    Field("init.alpha_mask", label="Alpha mask"),
    Field(
        "init.invert_mask", group=MASK, switches=(Switch("invert_mask", True, "black is repainted"),),
        label="Invert mask",
    ),
    Field(
        "init.mask_levels", group=MASK,
        switches=(Switch("mask_levels", True, "grey is how much changes: the share of the steps that may do it"),),
        label="Mask levels",
    ),
    Field(
        "init.crop_to_mask", {"low": 0, "high": _MAX_SIDE}, "crop_to_mask", MASK, "PX",
        "make only the region around the mask, with PX pixels more on each side, at --W by --H (default: the model's "
        "own size), and put it back into the image, which keeps its size", label="Masked area padding",
    ),
    Field(
        "init.mask_blur", {"low": 0, "high": 256}, "mask_blur", MASK, "PX",
        "how softly the new part fades in at its edges", label="Mask blur",
    ),
    Field(
        "paste", group=MASK,
        switches=(
            Switch(
                "no_paste", False,
                "leave the rest as the autoencoder gives it, instead of the image's own pixels",
            ),
        ),
        label="Paste",
    ),
    Field(
        "upscale", {"low": 1, "high": 8}, "upscale", "upscaling", "X", "enlarge the finished image and refine it",
        label="Hires upscale",
    ),
    Field("upscale_in", {}, "upscale_in", "upscaling", help="what is enlarged", label="Hires upscaler"),
    Field(
        "upscale_strength", {"low": 0, "high": 1}, "upscale_strength", "upscaling", "X",
        "the second pass's share of the steps, 0 to 1", label="Upscale strength",
    ),
    Field(
        "guidance_interval", {"low": 0}, "guidance_interval", "sampling", "LO,HI",
        "guide only between these shares of the steps, such as 0.1,0.7: other steps cost half (default: 0,1)",
        label="Guidance interval",
    ),
    Field(
        "guidance_interval_in", {}, "guidance_interval_in", "sampling",
        help="what --guidance_interval counts: shares of the steps, or sigma, the noise over the signal, which falls "
        "from 14.6 to 0", label="Guidance interval in",
    ),
    Field(
        "guidance_schedule", {}, "guidance_schedule", "sampling",
        help="how the guidance changes over the steps, with --scale as its mean: linear and cosine rise, those with "
        "_down fall, peak is high in the middle, valley at both ends", label="Guidance schedule",
    ),
    Field(
        "prompt_syntax", {}, "prompt_syntax", "prompt",
        help="a1111: (x:1.3), [x], BREAK, [from:to:when], [a|b] and AND in prompts mean what they mean in "
        "AUTOMATIC1111's web UI", label="Prompt syntax",
    ),
    Field(
        "clip_skip", {"low": 1, "high": 12}, "clip_skip", "prompt", "N",
        "the text encoder's layer that is used, counted from the end; 2 for many models that were trained so",
        label="Clip skip",
    ),
    Field(
        "guidance_rescale", {"low": 0, "high": 1}, "guidance_rescale", "sampling", "X",
        "share of a guided prediction that gets the contrast of the conditional one, for models that predict v",
        label="Guidance rescale",
    ),
    Field(
        "variation_seed", {"low": 0, "high": max(MAX_SEEDS.values())}, "variation_seed", "sampling", "N",
        "seed of the first image's variation; with --variation_strength it counts up, and --seed stays",
        label="Variation seed",
    ),
    Field(
        "variation_strength", {"low": 0, "high": 1}, "variation_strength", "sampling", "X",
        "how far the noise of --seed is turned to that of --variation_seed: 0 not at all, 1 wholly",
        label="Variation seed strength",
    ),
    Field(
        "seamless", {}, "seamless", "sampling",
        help="images that can be laid side by side: x joins left and right, y top and bottom, both all edges",
        label="Seamless",
    ),
    Field(
        "cache_steps", {"high": 3}, "cache_steps", "sampling", "N[,BRANCH[,CENTRE]]",
        "run the whole U-Net in each Nth step only, else its outermost blocks, 0 to BRANCH (DeepCache: approximate)",
        label="Cache steps",
    ),
    Field(
        "merge_tokens", {"low": 0, "high": 0.75}, "merge_tokens", "sampling", "RATIO",
        "merge this share of tokens in the largest self-attention (ToMe: approximate)", label="Token merging ratio",
    ),
    Field(
        "image_scale", {"low": 0, "high": 100}, "image_scale", START, "X",
        "how closely a model that edits images (InstructPix2Pix) keeps to the image, as a rule 1 to 2; 1 is off",
        label="Image CFG scale",
    ),
    Field("loras", {"high": MAX_LORAS}),
    Field(
        "controls", {"high": MAX_CONTROLS}, "control", CONTROL, "FILE:IMAGE[:WEIGHT[:START:END]]",
        "let a ControlNet or T2I-Adapter FILE hold the image to the hint IMAGE, or an IP-Adapter make it a prompt, "
        "with WEIGHT (1), between these shares of the steps (0:1); repeatable: their effects add up",
        unset=True, label="Controls", entry=split_control, entry_text=control_text,
    ),
    Field(
        "hint", {}, "hint", CONTROL,
        help="what is made of each hint image: none, it is a hint; edges (canny), grey, thick edges (scribble), a "
        "blurred copy (tile), or the image with the masked part left out (inpaint). Depth, poses and drawn lines "
        "need a network: give such images, made by any annotator",
        label="Hint",
    ),
    Field(
        "control_mode", {}, "control_mode", CONTROL,
        help="what counts more where prompt and hint disagree; guess: hardly any prompt is needed",
        label="Control mode",
    ),
    Field(
        "control_resize", {}, "control_resize", CONTROL,
        help="how a hint of another aspect becomes the image's size; none: it is refused", label="Control resize",
    ),
)  # fmt: skip


def _setting(name: str, hint: Any, limits: Mapping[str, Any]) -> Setting:
    """Builds the setting of a field from its annotation and its limits."""
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    (kind,) = (option for option in options if option is not type(None))
    extra: dict[str, Any] = {"optional": len(options) > 1, **limits}
    if get_origin(kind) is tuple:
        many = get_args(kind)[-1] is ...
        row = (get_args(get_args(kind)[0]) or (get_args(kind)[0],)) if many else get_args(kind)
        parts = tuple(_setting("" if many else name, part, {} if many else limits) for part in row)
        return Setting(name, tuple, row=parts, many=many, **extra)
    if get_origin(kind) is Literal:
        kind, extra["choices"] = str, get_args(kind)
    return Setting(name, kind, **extra)


def _annotations(cls: type, prefix: str = "") -> dict[str, Any]:
    return {prefix + name: hint for name, hint in get_type_hints(cls).items() if name != "init"}


_ANNOTATIONS = _annotations(Job) | _annotations(Init, INIT)
SETTINGS: Mapping[str, Setting] = {
    row.name: _setting(
        row.name,
        _ANNOTATIONS[row.name],
        {
            **row.limits,
            **{name: value for name in ("choices", "spell", "entry") if (value := getattr(row, name))},
        },
    )
    for row in FIELDS
}
# None for those that must be given
DEFAULTS: Mapping[str, Any] = {
    prefix + one.name: None if one.default is MISSING else one.default
    for cls, prefix in ((Job, ""), (Init, INIT))
    for one in fields(cls)
}
# the fields of options whose names differ, in both spellings
_BY_OPTION: Mapping[str, str] = {
    name: row.name for row in FIELDS if row.option for name in (row.option, row.dest)
}


def find_setting(name: str) -> Setting | None:
    """Returns the setting called `name`: a field of `Job`, `init.` and one of `Init`, or an option's name."""
    return SETTINGS.get(_BY_OPTION.get(name, name))


def __getattr__(name: str) -> Any:
    """Returns what was here in earlier commits."""
    return moved(__name__, name)
