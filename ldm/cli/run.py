"""One run, from options to files."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ldm import __version__
from ldm.cli.inputs import (
    MAX_SEED,
    Canvases,
    Start,
    check_latents,
    check_memory,
    check_options,
    choose_model,
    find_loras,
    need,
    read_loras,
    read_prompts,
    read_starts,
    split_batches,
)
from ldm.cli.report import Interrupts, Progress
from ldm.job import Job
from ldm.util import InputError, printable

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from ldm.checkpoints.embeddings import Embeddings
    from ldm.checkpoints.lora_files import LoraFiles
    from ldm.images.safety import Screen
    from ldm.images.writer import RunFolder
    from ldm.models.diffusion.ddpm import LatentDiffusion
    from ldm.pipeline import Picture, Pipeline

logger = logging.getLogger("ldm")


def make_batches(
    opt: argparse.Namespace, prompts: Sequence[Sequence[str]], starts: Sequence[Start]
) -> Iterator[list[Job]]:
    """The run's jobs, batch by batch, numbered and seeded."""
    index = 0
    for start in starts:
        for batch in itertools.chain.from_iterable(itertools.repeat(prompts, opt.n_iter)):
            first = 0 if opt.fixed_code else index
            yield [
                Job(
                    prompt=prompt,
                    negative_prompt=opt.negative_prompt,
                    seed=opt.seed if opt.seed_mode == "batch" else (opt.seed + first + i) % MAX_SEED,
                    width=start.width,
                    height=start.height,
                    steps=opt.ddim_steps,
                    sampler="plms" if opt.plms else "dpm_solver" if opt.dpm_solver else "ddim",
                    scale=opt.scale,
                    eta=opt.ddim_eta,
                    timestep_spacing=opt.timestep_spacing,
                    rng=opt.rng,
                    seed_mode=opt.seed_mode,
                    batch_index=index + i if opt.seed_mode == "batch" else 0,
                    init=start.init,
                    strength=opt.strength if start.init else 1.0,
                    posterior="mean" if opt.posterior_mean else "sample",
                    paste=not opt.no_paste,
                    upscale=opt.upscale,
                    upscale_in=opt.upscale_in,
                    upscale_strength=opt.upscale_strength,
                    loras=loras,
                )
                for i, (prompt, loras) in enumerate(read_loras(opt, prompt) for prompt in batch)
            ]
            index += len(batch)


Mark = Callable[["np.ndarray"], "np.ndarray"]


def _watermark(opt: argparse.Namespace) -> Mark:
    """What marks a picture; a missing library is found out before the model is loaded."""
    if opt.no_watermark:
        return lambda rgb: rgb
    from ldm.images.watermark import INPAINTING_TEXT, TEXT, Watermark

    return Watermark(INPAINTING_TEXT if opt.inpaint else TEXT).mark


def _screen(opt: argparse.Namespace, device: torch.device) -> Screen:
    """The safety check, by --safety."""
    from ldm.checkpoints.safety import OWN_FOLDER, find_safety_model, load_safety_model
    from ldm.images.safety import Screen

    path = None if opt.safety == "off" else find_safety_model(opt.safety_model)
    if path is not None:
        checker = load_safety_model(path, device)
        return Screen(checker, checker.side)
    where = f"put the files of CompVis/stable-diffusion-safety-checker into {OWN_FOLDER}"
    need(opt.safety != "on", f"--safety on: no safety model found; {where}")
    if opt.safety == "auto":
        logger.info("safety check: no model found, images are unchecked; %s", where)
    return Screen(None)


class Output:
    """Takes finished pictures to files: samples as they come, and a grid of all of them."""

    def __init__(
        self,
        opt: argparse.Namespace,
        folder: RunFolder,
        columns: int,
        mark: Mark,
        screen: Screen,
        extras: Callable[[Job], dict[str, str]],
    ) -> None:
        from ldm.images.grid import GridWriter

        self._opt, self._folder, self._mark, self._extras = opt, folder, mark, extras
        self._screen = screen
        self._grid = GridWriter(folder.path, columns, lambda sheet: folder.save_grid(mark(sheet)))
        self.saved = self.failed = 0

    def add(self, pictures: Sequence[Picture]) -> None:
        """Checks and writes pictures with the text that makes them again; what is not finite is reported."""
        from ldm.images.safety import SafetyError

        try:
            verdicts = self._screen.screen([picture.pixels for picture in pictures])
        except SafetyError as error:
            self.failed += len(pictures)
            logger.error("error: %s", error)
            return
        for picture, verdict in zip(pictures, verdicts, strict=True):
            if verdict.pixels is None:
                self._report_not_finite(picture.job)
            else:
                self._write(picture, verdict.pixels, {**picture.notes, "Safety": verdict.word})

    def _report_not_finite(self, job: Job) -> None:
        self.failed += 1
        logger.error(
            "error: the model gave no finite picture for seed %d, prompt %s; try --precision full",
            job.seed,
            printable(job.prompt),
        )

    def _write(self, picture: Picture, pixels: np.ndarray, notes: Mapping[str, str]) -> None:
        """Writes what was passed of a picture, marked wherever it is not the user's own."""
        from ldm.images.metadata import infotext

        job = picture.job
        if notes["Safety"] == "flagged":
            logger.warning("the safety check flagged seed %d, so its picture is blank", job.seed)
        if not self._opt.skip_save:
            marked = self._mark(pixels)
            if picture.kept is not None:
                marked[picture.kept] = pixels[picture.kept]
            self._folder.save_sample(marked, infotext(job, {**self._extras(job), **notes}))
        if not self._opt.skip_grid:
            self._grid.add(pixels)
        self.saved += 1

    def finish(self) -> None:
        """Writes the grid."""
        self._grid.finish()

    def close(self) -> None:
        """Drops what `finish` did not write."""
        self._grid.close()


def run(opt: argparse.Namespace) -> int:
    """Text and pictures to pictures: the exit code."""
    check_options(opt)
    prompts = split_batches(opt, read_prompts(opt))
    find_lora, loras = find_loras(opt, prompts)
    config_path, ckpt_path = choose_model(opt)

    from ldm.config import read_config
    from ldm.images.writer import RunFolder
    from ldm.pipeline import Pipeline, load_model
    from ldm.runtime.device import resolve_device, resolve_precision

    config = read_config(config_path, opt.allow_targets)
    check_latents(opt, config)
    canvases = Canvases(mask_needed=opt.inpaint)
    starts = read_starts(opt, config, canvases)
    device = resolve_device(opt.device)
    precision = resolve_precision(opt.precision, device)
    steps = _steps_of_each(opt, from_image=starts[0].init is not None)
    largest = max(starts, key=lambda start: start.width * start.height)
    check_memory(next(make_batches(opt, prompts, [largest]))[0], config)
    batches = opt.n_iter * len(prompts) * len(starts)
    images = opt.n_iter * sum(map(len, prompts)) * len(starts)
    columns = min(opt.n_rows if opt.n_rows > 0 else opt.n_samples, images)
    started = time.monotonic()
    with RunFolder(opt.outdir) as folder, Interrupts() as interrupts:
        mark, screen = _watermark(opt), _screen(opt, device)
        model = load_model(
            config, ckpt_path, device, opt.ema, vae=opt.vae, text_encoder=opt.text_encoder, dtype=None
        )
        embeddings = _embeddings(opt, model)
        pipeline = Pipeline(model, precision, canvases, opt.tiles, find_lora, opt.lowmem)
        for name in loras:
            pipeline.loras.read(name)
        extras = _extras(opt, config_path, ckpt_path, precision.name, canvases)
        extras = _with_hashes(extras, find_lora, embeddings)
        output = Output(opt, folder, columns, mark, screen, extras)
        logger.info("model loaded in %.1f s; %s, %s", time.monotonic() - started, device, precision.name)
        progress = Progress(images, steps * batches, opt.quiet)
        with contextlib.closing(output), contextlib.closing(progress):
            try:
                for pictures in _generate(opt, pipeline, make_batches(opt, prompts, starts), progress):
                    output.add(pictures)
                    if output.failed or interrupts.received:
                        break
            except InputError as error:  # a picture to start from went away meanwhile
                if not output.saved:
                    raise
                logger.error("error: %s", error)
                output.failed += 1
            output.finish()
    seconds = time.monotonic() - started
    logger.info(
        "%d images in %.1f s (%.2f s each, loading included) in %s",
        output.saved, seconds, seconds / max(output.saved, 1), printable(folder.path),
    )  # fmt: skip
    if interrupts.received:
        return 128 + interrupts.received
    return 1 if output.failed else 0


def _steps_of_each(opt: argparse.Namespace, from_image: bool) -> int:
    """How many denoising steps a picture takes, in both passes; said where it is not what was asked for."""
    from ldm.models.diffusion.schedule import make_timesteps, steps_to_run

    asked = opt.ddim_steps
    rows = asked if opt.dpm_solver else len(make_timesteps(opt.timestep_spacing, asked))
    if rows != asked:
        logger.info("compvis spacing has %d steps for --ddim_steps %d", rows, asked)
    steps = steps_to_run(opt.strength, asked, rows) if from_image else rows
    if from_image:
        logger.info("strength %g: %d of %d steps run", opt.strength, steps, rows)
        if steps == 0:
            logger.info("so the picture only passes through the autoencoder")
    if opt.upscale > 1:
        again = steps_to_run(opt.upscale_strength, asked, rows)
        logger.info("upscaling at strength %g: %d of %d more steps", opt.upscale_strength, again, rows)
        steps += again
    return steps


def _generate(
    opt: argparse.Namespace, pipeline: Pipeline, batches: Iterator[list[Job]], progress: Progress
) -> Iterator[list[Picture]]:
    """The pictures of each batch. In seed mode "batch" one stream of noise serves the whole run."""
    noise = None
    codes: dict[tuple[int, int], Tensor] = {}  # by size
    for jobs in batches:
        progress.begin(len(jobs))
        code, size = None, (jobs[0].width, jobs[0].height)
        if opt.seed_mode == "batch":
            noise = noise or pipeline.noise(jobs)
            if opt.fixed_code and size not in codes:
                codes[size] = pipeline.start_code(jobs[0], opt.n_samples, noise)
            code = codes[size][: len(jobs)] if opt.fixed_code else None
        pictures = pipeline.make(jobs, noise, code, progress.step)
        progress.end(len(jobs))
        yield pictures


def _extras(
    opt: argparse.Namespace, config: Path, ckpt: Path, precision: str, canvases: Canvases
) -> Callable[[Job], dict[str, str]]:
    """What else the metadata of a job's picture says, so that the command can be typed again.

    The checkpoint's hash takes seconds for a large file, so it is computed while the first pictures are made.
    """
    from ldm.checkpoints.hashing import files_sha256
    from ldm.checkpoints.reader import model_files

    hashes = {"Model hash": _in_background(files_sha256, model_files(ckpt))}
    extras = {
        "Model": ckpt.parent.name if ckpt.stem == "model" else ckpt.name if ckpt.is_dir() else ckpt.stem,
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

    if opt.vae is not None:
        extras["VAE"] = Path(opt.vae).name
        hashes["VAE hash"] = _in_background(files_sha256, model_files(opt.vae, "vae"))
    if opt.text_encoder is not None:
        extras["Text encoder"] = Path(opt.text_encoder).name
        files = model_files(opt.text_encoder, "text_encoder")
        hashes["Text encoder hash"] = _in_background(files_sha256, files)

    def of(job: Job) -> dict[str, str]:
        entries = {**{name: digest()[:10] for name, digest in hashes.items()}, **extras}
        if job.init is None:
            return entries
        canvas = canvases(job.init)
        return {**entries, "Init image hash": canvas.digest[:10], "Mask hash": canvas.mask_digest[:10]}

    return of


def _embeddings(opt: argparse.Namespace, model: LatentDiffusion) -> Embeddings | None:
    """The textual inversions that prompts can use; None if there are none."""
    if not opt.embedding and opt.embedding_dir is None:
        return None
    from ldm.checkpoints.embeddings import Embeddings

    return Embeddings(model.cond_stage_model, opt.embedding, opt.embedding_dir)


def _with_hashes(
    extras: Callable[[Job], dict[str, str]], find_lora: LoraFiles, embeddings: Embeddings | None
) -> Callable[[Job], dict[str, str]]:
    """`extras`, and which LoRAs and textual inversions a job uses, as AUTOMATIC1111's web UI says it."""
    from ldm.checkpoints.hashing import file_sha256
    from ldm.checkpoints.lora_files import lora_hash
    from ldm.images.metadata import file_name

    def of(job: Job) -> dict[str, str]:
        used = embeddings.used_in(job.prompt, job.negative_prompt) if embeddings else []
        return {
            **extras(job),
            "Lora hashes": _listed({file_name(name): lora_hash(find_lora(name)) for name, *_ in job.loras}),
            "TI hashes": _listed({e.name: file_sha256(e.path)[:12] for e in used}),
        }

    return of


def _listed(hashes: Mapping[str, str]) -> str:
    return ", ".join(f"{re.sub('[:,]', '', name)}: {digest}" for name, digest in hashes.items())


def _in_background(function: Callable[[list[Path]], str], paths: list[Path]) -> Callable[[], str]:
    """Starts `function(paths)` on a thread that never holds up the end of the process; the call waits for it."""
    results: list[str] = []
    thread = threading.Thread(target=lambda: results.append(function(paths)), daemon=True)
    thread.start()

    def result() -> str:
        thread.join()
        return results[0] if results else "unknown"

    return result
