"""One run, from options to files."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm import __version__
from ldm.cli import ranks
from ldm.cli.inputs import (
    Canvases,
    check_latents,
    check_options,
    choose_model,
    find_loras,
    need,
    read_starts,
)
from ldm.cli.kept import KeptModel
from ldm.cli.locate import model_name
from ldm.cli.manifest import Content, Page, RunFile, describe, join_run, open_run
from ldm.cli.output import Output, make_mark, make_screen
from ldm.cli.plan import Plan, check_job, count_steps, read_wishes, schedule_length
from ldm.cli.preview import show
from ldm.cli.report import Events, Interrupts, Progress, name_process
from ldm.cli.sheets import write_sheets
from ldm.job import Init, Job
from ldm.util import InputError, cache_path, printable

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ldm.checkpoints.embeddings import Embeddings
    from ldm.checkpoints.lora_files import LoraFiles
    from ldm.images.canvas import Canvas
    from ldm.images.writer import RunFolder
    from ldm.models.diffusion.ddpm import LatentDiffusion
    from ldm.pipeline import Pending, Pipeline
    from ldm.runtime.device import Precision

logger = logging.getLogger("ldm")

Planner = Callable[[argparse.Namespace, Mapping[str, Any], "LoraFiles"], Plan]


def plan_options(opt: argparse.Namespace, config: Mapping[str, Any], find_lora: LoraFiles) -> Plan:
    """What the options and the files that they name ask of a config's model."""
    wishes, canvases = read_wishes(opt), Canvases(mask_needed=opt.inpaint)
    starts = read_starts(opt, config, canvases)
    return Plan(opt, wishes, starts, canvases, lambda job: check_job(job, config, find_lora))


def run(opt: argparse.Namespace, kept: KeptModel | None = None, planner: Planner = plan_options) -> int:
    """Text and images to images: the exit code. The model is `kept` for the next run, or comes from the last one.

    `planner` makes the plan from the options, the checked config and what finds LoRAs; it may raise InputError.
    """
    ranks.hush()
    check_options(opt)
    need(
        not opt.verify or opt.resume, "--verify looks into the files of a run that goes on; give --resume too"
    )
    need(
        not (opt.resume and opt.skip_save),
        "--skip_save leaves no files to --resume from; leave one of them out",
    )

    from ldm.config import read_config

    config_path, ckpt_path = choose_model(opt)

    from ldm.runtime.device import resolve_device, resolve_precision  # torch, which takes seconds

    device = resolve_device(opt.device)
    ranks.check(opt, device)
    find_lora = find_loras(opt)
    config = read_config(config_path, opt.allow_targets)
    check_latents(opt, config)
    plan = planner(opt, config, find_lora)
    if opt.dry_run:
        _tell_steps(plan[0])
        return show(opt, plan, config, device, resolve_precision(opt.precision, device))
    code = ranks.start(opt)
    if code is not None:
        return code
    here = ranks.join(opt, device)
    if here.world > 1:
        name_process(here.rank, here.world, opt.quiet or here.rank > 0, opt.debug)
    precision = resolve_precision(opt.precision, here.device)
    _tell_steps(plan[0])
    kept = kept or KeptModel()
    source = _Source(config_path, config, ckpt_path, here, precision, plan.canvases, find_lora, kept)
    return _make(opt, plan, source)


@dataclass(frozen=True)
class _Source:
    """What a run's pictures come from, beside its jobs."""

    config_path: Path
    config: Mapping[str, Any]
    ckpt: Path
    here: ranks.Alone
    precision: Precision
    canvases: Callable[[Init], Canvas]
    find_lora: LoraFiles
    kept: KeptModel


def _make(opt: argparse.Namespace, plan: Plan, source: _Source) -> int:
    """Makes and writes what this process has to make of a plan: the exit code."""
    from ldm.images.writer import RunFolder

    here, started = source.here, time.monotonic()
    several = here.world > 1
    about = {"process": here.rank} if several else {}
    columns = min(opt.n_rows if opt.n_rows > 0 else opt.n_samples, len(plan))
    with RunFolder(opt.outdir) as folder, Interrupts() as interrupts, Events(opt.json, about) as events:
        claim = _Claim(opt, folder, plan, columns, source)
        if opt.resume:  # what is refused is refused before the model is loaded
            claim.take()
        mark, screen = make_mark(opt), make_screen(opt, here.device)
        pipeline, embeddings = _load(opt, plan, source)
        logger.info(
            "model loaded in %.1f s; %s, %s",
            time.monotonic() - started, here.device, source.precision.name,
        )  # fmt: skip
        claimed = claim.take()
        extras = _extras(opt, source, claimed.hashes, embeddings)
        on_cpu = here.device.type == "cpu"
        output = Output(opt, folder, claimed, columns, mark, screen, extras, events, on_cpu, several)
        batches = here.share([batch for batch in plan.batches() if output.wants(batch)])
        here.part()
        progress = Progress(
            sum(map(len, batches)),
            sum(count_steps(plan[batch[0]]) for batch in batches),
            opt.quiet or here.rank > 0,
        )
        events.emit(
            "start",
            folder=str(folder.path), run=str(claimed.path), images=len(plan), existing=output.existing,
        )  # fmt: skip
        with contextlib.closing(claimed), contextlib.closing(progress), output:
            try:
                for indices, pending in _generate(opt, pipeline, plan, batches, progress):
                    output.add(indices, partial(pipeline.finish, pending))
                    if output.failed or interrupts.received or here.deserted:
                        break
            except InputError as error:  # a picture to start from went away meanwhile
                output.wait()
                if not output.saved:
                    raise
                logger.error("error: %s", error)
                output.failed += 1
            if output.finish() and not opt.skip_save:
                write_sheets(plan, claimed, mark)
    seconds = time.monotonic() - started
    logger.info(
        "%d image%s in %.1f s (%.2f s each, loading included) in %s",
        output.saved, "s" * (output.saved != 1), seconds, seconds / max(output.saved, 1), printable(folder.path),
    )  # fmt: skip
    code = 128 + interrupts.received if interrupts.received else 1 if output.failed else 0
    if code and not opt.skip_save and not output.complete and not here.supervised:
        logger.warning("to make the rest, give the same command once more with --resume")
    events.emit("done", saved=output.saved, failed=output.failed, seconds=round(seconds, 3), code=code)
    return code


class _Claim:
    """The run's numbers: new ones, or with --resume those of the run that is gone on with.

    Of several processes the first takes them and tells the others.
    """

    def __init__(
        self, opt: argparse.Namespace, folder: RunFolder, plan: Plan, columns: int, source: _Source
    ) -> None:
        self._opt, self._folder, self._plan, self._columns = opt, folder, plan, columns
        self._here = source.here
        self._hashes = {} if self._here.rank else _hashes(opt, source.ckpt)
        self._settings = _settings(opt, plan, source)
        self._run: RunFile | None = None

    def take(self) -> RunFile:
        """The run; the first call decides which."""
        if self._run is None:
            made_from = describe(
                self._plan[:], self._plan.batches(), {"columns": self._columns, **self._settings}
            )
            if self._here.rank:
                self._run = join_run(self._folder, self._here.agree(), made_from)
            else:
                self._run = self._open(made_from)
                if self._here.world > 1:
                    self._run.share()
                self._here.agree(self._run.first)
        return self._run

    def _open(self, made_from: Content) -> RunFile:
        from ldm.images.grid import count_pages

        sizes = (job.upscaled_size for job in self._plan)
        pages: dict[Page, int] = {
            "grid": 0 if self._opt.skip_grid else count_pages(sizes, self._columns),
            "sheet": sum(1 for _ in self._plan.sheets()),
        }
        return open_run(self._folder, made_from, len(self._plan), pages, self._hashes, self._opt.resume)


def _settings(opt: argparse.Namespace, plan: Plan, source: _Source) -> dict[str, Any]:
    """What the pixels and the files depend on beside the jobs and the checkpoint."""
    from ldm.checkpoints.hashing import file_sha256

    inits = dict.fromkeys(job.init for job in plan.kinds() if job.init is not None)
    pictures = dict.fromkeys(path for init in inits for path in (init.image, init.mask) if path)
    below = sorted(Path(opt.embedding_dir).rglob("*")) if opt.embedding_dir is not None else []
    embeddings = [*(Path(path) for path, _ in opt.embedding), *(path for path in below if path.is_file())]
    names = (
        "n_samples",
        "fixed_code",
        "ema",
        "tiles",
        "no_watermark",
        "safety",
        "skip_grid",
        "inpaint",
        "compile",
    )
    return {
        **{name: getattr(opt, name) for name in names},
        "precision": source.precision.name,
        "device": source.here.device.type,
        "config": hashlib.sha256(source.config_path.read_bytes()).hexdigest(),
        "pictures": {
            printable(path): hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in pictures
        },
        "lora_files": {name: file_sha256(source.find_lora(name)) for name in plan.loras()},
        "embeddings": {printable(path): file_sha256(path) for path in embeddings},
    }


def _hashes(opt: argparse.Namespace, ckpt: Path) -> dict[str, Callable[[], str]]:
    """The SHA-256 of the files of weights; for large ones it takes seconds, so it is computed beside the rest."""
    from ldm.checkpoints.hashing import files_sha256

    return {f"{part} hash": _in_background(files_sha256, files) for part, files in _files(opt, ckpt).items()}


def _files(opt: argparse.Namespace, ckpt: Path) -> dict[str, list[Path]]:
    """The files of weights, by what the metadata calls them."""
    from ldm.checkpoints.reader import model_files

    files = {"Model": model_files(ckpt)}
    if opt.vae is not None:
        files["VAE"] = model_files(opt.vae, "vae")
    if opt.text_encoder is not None:
        files["Text encoder"] = model_files(opt.text_encoder, "text_encoder")
    return files


def _load(opt: argparse.Namespace, plan: Plan, source: _Source) -> tuple[Pipeline, Embeddings | None]:
    """The model on its device, with the LoRAs of the run read and its textual inversions known."""
    from ldm.checkpoints.cache import identity
    from ldm.pipeline import Pipeline, load_model

    load = partial(
        load_model,
        config=source.config,
        ckpt=source.ckpt,
        device=source.here.device,
        ema=opt.ema,
        mmap=not opt.no_mmap,
        vae=opt.vae,
        text_encoder=opt.text_encoder,
        dtype=None,
        cache=_weights_cache(opt, source.here.device, source.precision),
    )
    shape = partial(
        Pipeline, precision=source.precision, tiles=opt.tiles, lowmem=opt.lowmem, compiled=opt.compile
    )
    files = [file for of_part in _files(opt, source.ckpt).values() for file in of_part]
    key = load.keywords, shape.keywords, identity(files)
    pipeline = source.kept.get(key, lambda: shape(load()))
    pipeline.start_over(source.canvases, source.find_lora)
    embeddings = _embeddings(opt, pipeline.model)
    for name in plan.loras():
        pipeline.loras.read(name)
    return pipeline, embeddings


def _weights_cache(opt: argparse.Namespace, device: torch.device, precision: Precision) -> Path | None:
    """The folder of cached weights, if they are wanted and of use."""
    if opt.cache_weights is None:
        return None
    if device.type != "cpu" or precision.name != "bf16":
        logger.info(
            "--cache_weights is for bf16 on a CPU; %s on %s reads the checkpoint", precision.name, device
        )
        return None
    return Path(opt.cache_weights) if opt.cache_weights else cache_path("weights")


def _tell_steps(job: Job) -> None:
    """Says how many denoising steps a picture takes where it is not what was asked for."""
    from ldm.models.diffusion.schedule import steps_to_run

    rows = schedule_length(job)
    if rows != job.steps:
        logger.info("compvis spacing has %d steps for --ddim_steps %d", rows, job.steps)
    if job.init is not None:
        steps = steps_to_run(job.strength, job.steps, rows)
        logger.info("strength %g: %d of %d steps run", job.strength, steps, rows)
        if steps == 0:
            logger.info("so the picture only passes through the autoencoder")
    if job.upscale > 1:
        again = steps_to_run(job.upscale_strength, job.steps, rows)
        logger.info("upscaling at strength %g: %d of %d more steps", job.upscale_strength, again, rows)


def _generate(
    opt: argparse.Namespace,
    pipeline: Pipeline,
    plan: Plan,
    batches: Sequence[list[int]],
    progress: Progress,
) -> Iterator[tuple[list[int], list[Pending]]]:
    """The numbers and pictures of these batches of a plan, in the making.

    In seed mode "batch" one stream of noise serves all.
    """
    noise = None
    codes: dict[tuple[int, int], Tensor] = {}  # by size
    wanted = {batch[0] for batch in batches}
    for indices in plan.batches() if opt.seed_mode == "batch" else batches:
        jobs = [plan[i] for i in indices]
        code, size = None, (jobs[0].width, jobs[0].height)
        if opt.seed_mode == "batch":
            noise = noise or pipeline.noise(jobs)
            if opt.fixed_code and size not in codes:
                codes[size] = pipeline.start_code(jobs[0], opt.n_samples, noise)
            code = codes[size][: len(jobs)] if opt.fixed_code else None
            if indices[0] not in wanted:
                pipeline.skip(jobs, noise, code)
                continue
        progress.begin(len(jobs))
        pending = pipeline.begin(jobs, noise, code, progress.step)
        progress.end(len(jobs))
        yield indices, pending


def _extras(
    opt: argparse.Namespace,
    source: _Source,
    hashes: Mapping[str, Callable[[], str]],
    embeddings: Embeddings | None,
) -> Callable[[Job], dict[str, str]]:
    """What else the metadata of a job's picture says, so that the command can be typed again.

    LoRAs and textual inversions are named as AUTOMATIC1111's web UI does it.
    """
    from ldm.checkpoints.hashing import file_sha256
    from ldm.checkpoints.lora_files import lora_hash
    from ldm.images.metadata import file_name

    extras = {
        "Model": model_name(source.ckpt),
        "Config": source.config_path.stem,
        "Precision": source.precision.name,
        "Version": f"ldm {__version__}",
    }
    if opt.ema != "auto":
        extras["EMA"] = opt.ema
    if opt.seed_mode == "batch":
        extras["Batch size"] = str(opt.n_samples)
    if opt.fixed_code:
        extras["Fixed code"] = "on"
    if opt.no_watermark:
        extras["Watermark"] = "off"
    if opt.vae is not None:
        extras["VAE"] = Path(opt.vae).name
    if opt.text_encoder is not None:
        extras["Text encoder"] = Path(opt.text_encoder).name

    def of(job: Job) -> dict[str, str]:
        entries = {**{name: digest()[:10] for name, digest in hashes.items()}, **extras}
        if job.init is not None:
            canvas = source.canvases(job.init)
            entries |= {"Init image hash": canvas.digest[:10], "Mask hash": canvas.mask_digest[:10]}
        loras = {file_name(name): lora_hash(source.find_lora(name)) for name, *_ in job.loras}
        used = embeddings.used_in(job.prompt, job.negative_prompt) if embeddings else []
        inversions = {e.name: file_sha256(e.path)[:12] for e in used}
        return {**entries, "Lora hashes": _listed(loras), "TI hashes": _listed(inversions)}

    return of


def _embeddings(opt: argparse.Namespace, model: LatentDiffusion) -> Embeddings | None:
    """The textual inversions that prompts can use; None if there are none."""
    if not opt.embedding and opt.embedding_dir is None:
        return None
    from ldm.checkpoints.embeddings import Embeddings

    return Embeddings(model.cond_stage_model, opt.embedding, opt.embedding_dir)


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
