"""What every script shares: options, checks, the run itself, its report and the exit codes.

0: all done. 1: some image failed, or a resource ran out. 2: bad input, nothing generated. 128 + n: ended by
signal n. Everything heavy is imported inside functions, so that `--help` is instant.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import io
import logging
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ldm import __version__
from ldm.job import Job
from ldm.util import InputError, find, printable

if TYPE_CHECKING:
    import numpy as np

    from ldm.images.writer import RunFolder
    from ldm.pipeline import Picture, Pipeline

logger = logging.getLogger("ldm")

V1_CONFIG = "configs/stable-diffusion/v1-inference.yaml"
V1_CKPT = "models/ldm/stable-diffusion-v1/model.ckpt"
BUNDLED_CONFIG = "configs/shapes/shapes-inference.yaml"
BUNDLED_CKPT = "models/ldm/shapes/model.ckpt"
LAION_CONFIG = "configs/latent-diffusion/txt2img-1p4B-eval.yaml"
LAION_CKPT = "models/ldm/text2img-large/model.ckpt"
LAION_OUTDIR = "outputs/txt2img-samples-laion400m"
MAX_SEED = 2**32
MAX_COUNT = 100_000


# --- options ------------------------------------------------------------------------------------------------


class _Help(argparse.HelpFormatter):
    """Shows the defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = action.default in (argparse.SUPPRESS, None, "", []) or action.default is False
        return action.help if silent else f"{action.help} (default: %(default)s)"


class _Parser(argparse.ArgumentParser):
    """Shows what was typed with terminal controls escaped."""

    def error(self, message: str) -> NoReturn:
        super().error(printable(message))


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser with grouped help."""
    return _Parser(description=description, formatter_class=_Help)


def add_prompt_options(parser: argparse.ArgumentParser, prompt: str) -> None:
    """What is drawn."""
    group = parser.add_argument_group("prompt")
    group.add_argument("--prompt", metavar="TEXT", default=prompt, help="what to draw")
    group.add_argument("--negative_prompt", metavar="TEXT", default="", help="what to keep away from")
    group.add_argument(
        "--from-file", dest="from_file", metavar="FILE", help="read prompts from a file, one a line"
    )


def add_sampling_options(parser: argparse.ArgumentParser, scale: float) -> None:
    """How it is drawn."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--ddim_steps", metavar="N", type=int, default=50, help="denoising steps, 1 to 999")
    samplers = group.add_mutually_exclusive_group()
    samplers.add_argument("--plms", action="store_true", help="use the PLMS sampler instead of DDIM")
    samplers.add_argument("--dpm_solver", action="store_true", help="use DPM-Solver++ instead of DDIM")
    group.add_argument("--ddim_eta", metavar="X", type=float, default=0.0, help="DDIM's noise, 0 to 1")
    group.add_argument(
        "--scale",
        metavar="X",
        type=float,
        help=f"guidance scale; 1 turns guidance off (default: {scale}, or what the model's config says)",
    )
    parser.set_defaults(usual_scale=scale)
    group.add_argument(
        "--timestep_spacing",
        choices=("uniform", "compvis", "quad"),
        default="uniform",
        help="which timesteps are visited; compvis gives the original's list, which can be longer than asked",
    )
    group.add_argument("--seed", metavar="N", type=int, default=42, help="seed of the first image")
    group.add_argument(
        "--seed_mode",
        choices=("image", "batch"),
        default="image",
        help="image: image i has seed + i and can be made again alone; batch: one stream, as in the original",
    )
    group.add_argument(
        "--rng",
        choices=("philox", "cpu", "device"),
        default="philox",
        help="philox: the noise of a CUDA device, on any device; cpu, device: torch's generator there",
    )
    group.add_argument("--fixed_code", action="store_true", help="start every batch from the same noise")


def add_size_options(parser: argparse.ArgumentParser) -> None:
    """How large."""
    group = parser.add_argument_group("size")
    model_size = "the model's own size"
    group.add_argument("--H", metavar="N", type=int, help=f"height in pixels (default: {model_size})")
    group.add_argument("--W", metavar="N", type=int, help=f"width in pixels (default: {model_size})")
    group.add_argument("--C", metavar="N", type=int, default=4, help="latent channels, as in the config")
    group.add_argument("--f", metavar="N", type=int, default=8, help="downsampling factor, as in the config")


def add_batch_options(parser: argparse.ArgumentParser, n_iter: int, n_samples: int) -> None:
    """How many."""
    group = parser.add_argument_group("batches")
    group.add_argument(
        "--n_iter", metavar="N", type=int, default=n_iter, help="how often to repeat everything"
    )
    group.add_argument(
        "--n_samples", metavar="N", type=int, default=n_samples, help="images per prompt and batch size"
    )
    group.add_argument(
        "--n_rows", metavar="N", type=int, default=0, help="images in a grid's row (0: n_samples)"
    )


def add_output_options(parser: argparse.ArgumentParser, outdir: str) -> None:
    """Where the pictures go."""
    group = parser.add_argument_group("output")
    group.add_argument("--outdir", metavar="DIR", default=outdir, help="folder for samples and grids")
    group.add_argument("--skip_grid", action="store_true", help="do not write a grid")
    group.add_argument("--skip_save", action="store_true", help="do not write single images")
    group.add_argument("--no_watermark", action="store_true", help="leave the invisible watermark out")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Which weights, where and how they run."""
    group = parser.add_argument_group("model")
    group.add_argument("--config", metavar="FILE", help=f"model config (default: {V1_CONFIG})")
    group.add_argument(
        "--ckpt",
        metavar="FILE",
        help=f"checkpoint (default: {V1_CKPT}, or the bundled model if that is absent)",
    )
    group.add_argument(
        "--laion400m",
        action="store_true",
        help=f"use the LAION-400M model: {LAION_CONFIG}, {LAION_CKPT}, {LAION_OUTDIR}",
    )
    group.add_argument(
        "--ema",
        choices=("auto", "on", "off"),
        default="auto",
        help="use a checkpoint's averaged weights; auto: if it has any",
    )
    group.add_argument(
        "--allow_targets",
        metavar="PACKAGE",
        action="append",
        default=[],
        help="let the config use classes of this package, which runs its code",
    )
    group.add_argument(
        "--precision",
        choices=("full", "autocast"),
        default="autocast",
        help="full: float32; autocast: fp16 on a GPU, bf16 on a CPU that can",
    )
    group.add_argument("--device", metavar="NAME", default="auto", help="auto, cpu, cuda, cuda:N or mps")


def add_report_options(parser: argparse.ArgumentParser) -> None:
    """What is said."""
    group = parser.add_argument_group("report")
    group.add_argument("--quiet", action="store_true", help="say nothing but warnings and errors")
    group.add_argument("--debug", action="store_true", help="show tracebacks and details")
    group.add_argument("--version", action="version", version=__version__)


# --- checks -------------------------------------------------------------------------------------------------


def check_options(opt: argparse.Namespace) -> None:
    """Numbers in range and options that go together, else an `InputError` that names the option."""
    _need(1 <= opt.ddim_steps <= 999, f"--ddim_steps is {opt.ddim_steps}; give 1 to 999")
    _need(0 <= opt.seed < MAX_SEED, f"--seed is {opt.seed}; give 0 to {MAX_SEED - 1}")
    _need(opt.scale is None or math.isfinite(opt.scale), f"--scale is {opt.scale}; give a finite number")
    _need(math.isfinite(opt.ddim_eta) and opt.ddim_eta >= 0, f"--ddim_eta is {opt.ddim_eta}; give 0 to 1")
    for name in ("plms", "dpm_solver"):
        given = getattr(opt, name)
        _need(
            not (given and opt.ddim_eta),
            f"--{name} adds no noise, so --ddim_eta {opt.ddim_eta} is impossible",
        )
    spaced = opt.timestep_spacing != "uniform"
    _need(not (opt.dpm_solver and spaced), "--dpm_solver has uniform --timestep_spacing only")
    for name in ("n_iter", "n_samples"):
        _need(
            1 <= getattr(opt, name) <= MAX_COUNT, f"--{name} is {getattr(opt, name)}; give 1 to {MAX_COUNT}"
        )
    if opt.ddim_eta > 1:
        logger.warning("--ddim_eta %g is above 1: more noise than the method allows for", opt.ddim_eta)
    if opt.skip_grid and opt.skip_save:
        logger.warning("--skip_grid and --skip_save together: nothing will be written")


def _need(condition: bool, message: str) -> None:
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


def _text(option: str, text: str) -> str:
    """A command-line text as UTF-8 even where the locale is ASCII, else an `InputError`."""
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError:
        raise InputError(f"{option} holds bytes that are not UTF-8: {printable(text)[:80]}") from None


def choose_model(opt: argparse.Namespace) -> tuple[Path, Path]:
    """Config and checkpoint, both there: the user's, v1's at its place, or the bundled model's."""
    if opt.laion400m:
        config, ckpt = LAION_CONFIG, LAION_CKPT
        opt.outdir = LAION_OUTDIR
    elif opt.config is None and opt.ckpt is None and not os.path.lexists(find(V1_CKPT)):
        config, ckpt = BUNDLED_CONFIG, BUNDLED_CKPT
        logger.info(
            "no Stable Diffusion weights at %s, so this is the bundled model, which draws coloured solids; "
            "to use v1: ln -s /path/to/sd-v1-4.ckpt %s",
            V1_CKPT,
            V1_CKPT,
        )
    else:
        config, ckpt = opt.config or V1_CONFIG, opt.ckpt or V1_CKPT
    for what, path in (("config", config), ("checkpoint", ckpt)):
        option = "--config" if what == "config" else "--ckpt"
        hint = "--laion400m needs it there" if opt.laion400m else f"give another with {option}"
        _need(_exists(find(path)), f"the {what} {printable(path)} does not exist; {hint}")
    return find(config), find(ckpt)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:
        raise InputError(f"cannot look at {printable(path)[:200]}: {error.strerror}") from None


def check_size(opt: argparse.Namespace, model: dict[str, Any]) -> tuple[int, int]:
    """Width and height, by default the config's, checked against the config's factor and channels."""
    from ldm.pipeline import ConfigError, section

    params = section(model)
    dd = section(model, "first_stage_config").get("ddconfig") or {}
    try:
        factor = 2 ** (len(dd.get("ch_mult", (1, 2, 4, 4))) - 1)
        own_side = int(params.get("image_size", 64)) * factor
        width = int(dd.get("ch", 128))
    except (AttributeError, TypeError, ValueError):
        raise ConfigError(
            "the config's image_size, ddconfig.ch or ddconfig.ch_mult is no number or list"
        ) from None
    channels = params.get("channels", opt.C)
    _need(channels == opt.C, f"--C is {opt.C}, but the model has {channels} latent channels")
    _need(factor == opt.f, f"--f is {opt.f}, but the model's downsampling factor is {factor}")
    size = []
    for name in ("W", "H"):
        given = getattr(opt, name)
        side = own_side if given is None else given
        below, above = side // factor * factor, -(-side // factor) * factor
        nearest = f"{below} or {above}" if below >= factor else str(max(above, factor))
        _need(side > 0 and side % factor == 0, f"--{name} is {side}, no multiple of {factor}: use {nearest}")
        size.append(side)
    _check_memory(size[0] * size[1], width)
    return size[0], size[1]


def own_scale(model: dict[str, Any], usual: float) -> float:
    """The guidance scale that a config recommends under `sampling`, else the usual one."""
    recommended = (model.get("sampling") or {}).get("scale", usual)
    _need(
        isinstance(recommended, int | float) and math.isfinite(recommended),
        f"the config's sampling.scale is {recommended!r}; it must be a finite number",
    )
    return float(recommended)


def _check_memory(pixels: int, channels: int) -> None:
    """Refuses sizes whose decoding alone (some five float32 maps of the widest level) can never fit."""
    try:
        available = next(
            int(line.split()[1]) * 1024
            for line in Path("/proc/meminfo").read_text().splitlines()
            if line.startswith("MemTotal")
        )
    except (OSError, StopIteration):
        return
    needed = 5 * 4 * channels * pixels
    _need(
        needed <= 4 * available,
        f"an image of {pixels:,} pixels needs about {needed / 2**30:.0f} GiB to decode; this machine has "
        f"{available / 2**30:.0f} GiB; use a smaller --W and --H",
    )


# --- the run ------------------------------------------------------------------------------------------------


def make_batches(
    opt: argparse.Namespace, prompts: Sequence[Sequence[str]], width: int, height: int
) -> Iterator[list[Job]]:
    """The run's jobs, batch by batch, numbered and seeded."""
    index = 0
    for _ in range(opt.n_iter):
        for batch in prompts:
            start = 0 if opt.fixed_code else index
            yield [
                Job(
                    prompt=prompt,
                    negative_prompt=opt.negative_prompt,
                    seed=opt.seed if opt.seed_mode == "batch" else (opt.seed + start + i) % MAX_SEED,
                    width=width,
                    height=height,
                    steps=opt.ddim_steps,
                    sampler="plms" if opt.plms else "dpm_solver" if opt.dpm_solver else "ddim",
                    scale=opt.scale,
                    eta=opt.ddim_eta,
                    timestep_spacing=opt.timestep_spacing,
                    rng=opt.rng,
                    seed_mode=opt.seed_mode,
                    batch_index=index + i if opt.seed_mode == "batch" else 0,
                )
                for i, prompt in enumerate(batch)
            ]
            index += len(batch)


class Interrupts:
    """The first Ctrl-C (or TERM, HUP) asks to stop behind the batch in hand, the second stops at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._old: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            # a run under nohup goes on when the terminal closes
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                with contextlib.suppress(ValueError):  # not in the main thread: somebody else's signals
                    self._old[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: object) -> None:
        if self.received is not None:
            raise SystemExit(128 + number)
        self.received = number
        logger.warning("stopping behind this batch; once more to stop at once")


class Progress:
    """A bar over all denoising steps on a terminal, a line a batch elsewhere; both say the time left."""

    def __init__(self, images: int, steps: int, quiet: bool) -> None:
        from tqdm import tqdm

        self.images, self.done, self.started = images, 0, time.monotonic()
        self._bar = tqdm(
            total=steps,
            unit="step",
            disable=True if quiet else None,
            dynamic_ncols=True,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps, {remaining} left, {rate_fmt}",
        )

    def begin(self, count: int) -> None:
        last = self.done + count
        which = f"image {last}" if count == 1 else f"images {self.done + 1}-{last}"
        self._bar.set_description_str(f"{which} of {self.images}", refresh=True)

    def step(self, _: int) -> None:
        self._bar.update()

    def end(self, count: int) -> None:
        self.done += count
        if self._bar.disable:
            each = (time.monotonic() - self.started) / self.done
            left = each * (self.images - self.done)
            logger.info("image %d of %d, %.1f s each, %.0f s left", self.done, self.images, each, left)

    def close(self) -> None:
        self._bar.close()


Mark = Callable[["np.ndarray"], "np.ndarray"]


def _watermark(opt: argparse.Namespace) -> Mark:
    """What marks a picture; a missing library is found out before the model is loaded."""
    if opt.no_watermark:
        return lambda rgb: rgb
    from ldm.images.watermark import Watermark

    return Watermark().mark


class Output:
    """Takes finished pictures to files: samples as they come, and a grid of all of them."""

    def __init__(
        self,
        opt: argparse.Namespace,
        folder: RunFolder,
        columns: int,
        mark: Mark,
        extras: Callable[[], dict[str, str]],
    ) -> None:
        from ldm.images.grid import GridWriter

        self._opt, self._folder, self._mark, self._extras = opt, folder, mark, extras
        self._grid = GridWriter(folder.path, columns, lambda sheet: folder.save_grid(mark(sheet)))
        self.saved = self.failed = 0

    def add(self, picture: Picture) -> None:
        """Writes a picture with the text that makes it again; one that is not finite is reported instead."""
        from ldm.images.metadata import infotext

        job = picture.job
        if picture.pixels is None:
            self.failed += 1
            logger.error(
                "error: the model gave no finite picture for seed %d, prompt %s; try --precision full",
                job.seed,
                printable(job.prompt),
            )
            return
        if not self._opt.skip_save:
            text = infotext(job, {**self._extras(), **picture.notes})
            self._folder.save_sample(self._mark(picture.pixels), text)
        if not self._opt.skip_grid:
            self._grid.add(picture.pixels)
        self.saved += 1

    def finish(self) -> None:
        """Writes the grid."""
        self._grid.finish()

    def close(self) -> None:
        """Drops what `finish` did not write."""
        self._grid.close()


def run(opt: argparse.Namespace) -> int:
    """Text to pictures, from options to files: the exit code."""
    check_options(opt)
    prompts = read_prompts(opt)
    config_path, ckpt_path = choose_model(opt)

    from ldm.images.writer import RunFolder
    from ldm.models.diffusion.schedule import make_timesteps
    from ldm.pipeline import Pipeline, load_model, read_config
    from ldm.runtime.device import resolve_device, resolve_precision

    config = read_config(config_path, opt.allow_targets)
    width, height = check_size(opt, config)
    if opt.scale is None:
        opt.scale = own_scale(config, opt.usual_scale)
    steps = len(make_timesteps(opt.timestep_spacing, opt.ddim_steps))
    if steps != opt.ddim_steps:
        logger.info("compvis spacing runs %d steps for --ddim_steps %d", steps, opt.ddim_steps)
    device = resolve_device(opt.device)
    precision = resolve_precision(opt.precision, device)
    images = opt.n_iter * sum(map(len, prompts))
    columns = min(opt.n_rows if opt.n_rows > 0 else opt.n_samples, images)
    started = time.monotonic()
    with RunFolder(opt.outdir) as folder, Interrupts() as interrupts:
        mark = _watermark(opt)
        pipeline = Pipeline(load_model(config, ckpt_path, device, opt.ema), precision)
        output = Output(opt, folder, columns, mark, _extras(opt, config_path, ckpt_path, precision.name))
        logger.info("model loaded in %.1f s; %s, %s", time.monotonic() - started, device, precision.name)
        progress = Progress(images, steps * opt.n_iter * len(prompts), opt.quiet)
        with contextlib.closing(output), contextlib.closing(progress):
            for pictures in _generate(opt, pipeline, make_batches(opt, prompts, width, height), progress):
                for picture in pictures:
                    output.add(picture)
                if output.failed or interrupts.received:
                    break
            output.finish()
    seconds = time.monotonic() - started
    logger.info(
        "%d images in %.1f s (%.2f s each, loading included) in %s",
        output.saved, seconds, seconds / max(output.saved, 1), printable(folder.path),
    )  # fmt: skip
    if interrupts.received:
        return 128 + interrupts.received
    return 1 if output.failed else 0


def _generate(
    opt: argparse.Namespace, pipeline: Pipeline, batches: Iterator[list[Job]], progress: Progress
) -> Iterator[list[Picture]]:
    """The pictures of each batch. In seed mode "batch" one stream of noise serves the whole run."""
    noise = code = None
    for jobs in batches:
        progress.begin(len(jobs))
        if opt.seed_mode == "batch":
            noise = noise or pipeline.noise(jobs)
            if opt.fixed_code and code is None:
                code = pipeline.start_code(jobs[0], opt.n_samples, noise)
        start_code = None if code is None else code[: len(jobs)]
        pictures = pipeline.make(jobs, noise, start_code, progress.step)
        progress.end(len(jobs))
        yield pictures


def _extras(
    opt: argparse.Namespace, config: Path, ckpt: Path, precision: str
) -> Callable[[], dict[str, str]]:
    """What else the metadata says, so that the command can be typed again.

    The checkpoint's hash takes seconds for a large file, so it is computed while the first pictures are made.
    """
    from ldm.checkpoints.hashing import file_sha256

    digest = _in_background(file_sha256, ckpt)
    extras = {
        "Model": ckpt.parent.name if ckpt.stem == "model" else ckpt.stem,
        "Config": config.stem,
        "Precision": precision,
        "Version": f"ldm {__version__}",
    }
    if opt.ema != "auto":
        extras["EMA"] = opt.ema
    if opt.seed_mode == "batch":
        extras["Batch size"] = str(opt.n_samples)
    if opt.fixed_code:
        extras["Fixed code"] = "on"
    return lambda: {"Model hash": digest()[:10], **extras}


def _in_background(function: Callable[[Path], str], path: Path) -> Callable[[], str]:
    """Starts `function(path)` on a thread that never holds up the end of the process; the call waits for it."""
    results: list[str] = []
    thread = threading.Thread(target=lambda: results.append(function(path)), daemon=True)
    thread.start()

    def result() -> str:
        thread.join()
        return results[0] if results else "unknown"

    return result


# --- messages and exit codes --------------------------------------------------------------------------------


class _Lines(logging.Formatter):
    """Plain text for what is going on, the level in front of warnings."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return f"warning: {text}" if record.levelno == logging.WARNING else text


class _Stderr(logging.Handler):
    """Writes above the progress bar; a closed pipe or an ASCII terminal never stops the run."""

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        with contextlib.suppress(
            OSError, ValueError, RuntimeError
        ):  # RuntimeError: a signal came while writing
            if "tqdm" in sys.modules:
                from tqdm import tqdm

                tqdm.write(text, file=sys.stderr)
            else:
                print(text, file=sys.stderr, flush=True)


def set_up_messages(quiet: bool, debug: bool) -> None:
    """Logs to stderr: everything with `debug`, only warnings and errors with `quiet`."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    handler = _Stderr()
    handler.setFormatter(_Lines("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logger.setLevel(logging.DEBUG if debug else logging.WARNING if quiet else logging.INFO)


def main(
    parser: argparse.ArgumentParser, script: Callable[[argparse.Namespace], int], argv: Sequence[str] | None
) -> int:
    """Parses, runs and turns every outcome into one line and an exit code."""
    opt = parser.parse_args(argv)
    set_up_messages(opt.quiet, opt.debug)
    with contextlib.suppress(AttributeError, ValueError, OSError):  # stderr can be no real file
        faulthandler.enable()  # a checkpoint that shrinks while it is mapped ends the process without a word
    try:
        return script(opt)
    except InputError as error:
        return _fail(f"error: {error}", 2, opt.debug)
    except KeyboardInterrupt:
        return _fail("error: interrupted", 130, False)
    except MemoryError:
        return _fail("error: out of memory; use a smaller --n_samples, --W or --H", 1, opt.debug)
    except OSError as error:
        where = f"{printable(error.filename)}: " if error.filename else ""
        return _fail(f"error: {where}{error.strerror or error}", 1, opt.debug)
    except Exception as error:  # noqa: BLE001 - the one place where any fault becomes one line
        if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error):
            line = " ".join(printable(error).split())[:200]
            return _fail(
                f"error: out of memory ({line}); use a smaller --n_samples, --W or --H", 1, opt.debug
            )
        if "CUDA error" in str(error) or type(error).__name__ == "AcceleratorError":
            line = " ".join(printable(error).split())[:200]
            return _fail(
                f"error: the GPU failed ({line}); finished images are kept, start again", 1, opt.debug
            )
        what = " ".join(printable(f"{type(error).__name__}: {error}").split())[:300]
        return _fail(f"error: {what}; this is a bug, run with --debug to see where", 1, opt.debug)


def _fail(line: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    logger.error("%s", line)
    return code
