"""Typed options become a request for images and the options of a run."""

from __future__ import annotations

import argparse
import logging
from dataclasses import fields, replace
from typing import Any

from ldm.cli.effects import warn_of_options_without_effect
from ldm.cli.fast import with_fast
from ldm.fields import DEFAULTS, FIELDS, SETTINGS, SIZE
from ldm.files import check_there
from ldm.job import Init, Job
from ldm.job_values import override, values_of_options
from ldm.prompts.files import MAX_LINE, too_long
from ldm.prompts.lines import MAX_COUNT
from ldm.runs.options import Request, RunOptions
from ldm.runs.previews import check_animation
from ldm.util import InputError, is_list, need, printable

logger = logging.getLogger("ldm")


def options_of(opt: argparse.Namespace) -> RunOptions:
    """Returns the typed options of a run."""
    typed = {field.name: getattr(opt, field.name) for field in fields(RunOptions) if hasattr(opt, field.name)}
    values: dict[str, Any] = {
        name: tuple(value) if is_list(value) else value for name, value in typed.items()
    }
    return RunOptions(**values, channels=opt.C, factor=opt.f)


def request_of(opt: argparse.Namespace) -> Request:
    """Returns the request for images. Raises InputError for invalid texts and sizes."""
    for name in ("W", "H"):
        side = getattr(opt, name)
        need(side is None or side > 0, f"--{name} is {side}; give a multiple of {opt.f}, at least {opt.f}")
    values = with_fast(opt.fast, values_of_options(vars(opt)), DEFAULTS)
    values |= {name: _text(f"--{name}", values[name]) for name in ("prompt", "negative_prompt")}
    values |= {"sampler": chosen_sampler(opt)} | ({} if opt.from_file is None else {"prompt": ""})
    given = sum(side is not None for side in (opt.W, opt.H))
    start = Init("", width=opt.W, height=opt.H, resize=("none", "fit", "fill")[given])
    job = override(Job("", init=start), values | {"init.image": ""})
    return Request(
        job=replace(job, init=None),
        start=job.init or start,
        images=tuple(opt.init_img),
        folder=opt.indir,
        from_file=opt.from_file,
        prompt_format=opt.prompt_format,
        expand=opt.expand,
        sweep=tuple(opt.sweep),
    )


def _text(option: str, text: str) -> str:
    """Returns a text as UTF-8 even where the locale is ASCII; raises InputError if it is too long."""
    need(len(text) <= MAX_LINE, f"{option} is {too_long()}")
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError:
        raise InputError(f"{option} holds bytes that are not UTF-8: {printable(text)[:80]}") from None


def check_options(opt: argparse.Namespace) -> None:
    """Checks ranges and combinations of options; raises an InputError that names the option."""
    chosen_sampler(opt)
    _check_ranges(opt)
    for name in ("n_iter", "n_samples", "images_per_prompt"):
        count = getattr(opt, name)
        need(count is None or 1 <= count <= MAX_COUNT, f"--{name} is {count}; give 1 to {MAX_COUNT}")
    need(
        opt.safety != "off" or opt.safety_model is None,
        f"--safety off does not go with --safety_model {printable(opt.safety_model)}; leave one out",
    )
    need(opt.preview >= 0, f"--preview is {opt.preview}; give a number of steps, 1 or more")
    if opt.preview_vae is not None:
        need(
            bool(opt.preview or opt.animate),
            "--preview_vae decodes previews; give --preview or --animate too",
        )
        check_there(opt.preview_vae, "give the file of a TAESD")
    check_animation(opt.animate)
    need(not opt.verify or opt.resume, "--verify checks the files of a run that continues; give --resume too")
    for option, reason in (("resume", "continue"), ("gallery", "show")):
        need(
            not (getattr(opt, option) and opt.skip_save),
            f"--skip_save leaves no files for --{option} to {reason}; leave one of them out",
        )
    need(
        opt.on_oom != "halve" or opt.seed_mode == "image",
        "--on_oom halve changes the size of batches, on which the noise of --seed_mode batch depends; "
        "leave one of them out",
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


def _check_ranges(opt: argparse.Namespace) -> None:
    """Checks the numbers that options give to fields. A size has messages of its own."""
    for row in FIELDS:
        value = getattr(opt, row.dest) if row.option and row.name not in SIZE else None
        if isinstance(value, int | float | tuple):
            try:
                SETTINGS[row.name].check(value)
            except ValueError as error:
                raise InputError(f"--{row.option} {error}") from None


def chosen_sampler(opt: argparse.Namespace) -> str:
    """Returns the sampler that --sampler or a switch selects."""
    for row in FIELDS:
        for name, value, _ in row.switches if row.name == "sampler" else ():
            need(
                not getattr(opt, name) or opt.sampler in (None, value),
                f"--{name} and --sampler {opt.sampler} contradict; leave one of them out",
            )
    return values_of_options(vars(opt)).get("sampler", DEFAULTS["sampler"])
