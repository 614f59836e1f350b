"""What a run would make, in words, without its model: --dry_run."""

from __future__ import annotations

import argparse
import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli.estimate import (
    PROGRAM,
    Memory,
    batch_kinds,
    count_texts,
    needed_memory,
    parallel,
    run_seconds,
)
from ldm.cli.plan import Plan, count_steps
from ldm.util import printable

if TYPE_CHECKING:
    import torch

    from ldm.models.diffusion.ddpm import LatentDiffusion
    from ldm.runtime.device import Precision

SHOWN = 50  # batches, and prompts that are cut


def show(
    opt: argparse.Namespace, plan: Plan, config: Mapping[str, Any], device: torch.device, precision: Precision
) -> int:
    """Prints the plan of a run: the exit code."""
    for line in preview(opt, plan, config, device, precision):
        print(line)
    return 0


def preview(
    opt: argparse.Namespace, plan: Plan, config: Mapping[str, Any], device: torch.device, precision: Precision
) -> Iterator[str]:
    """Images, batches, sizes, cut prompts, memory and time, a line each. No weights are read, nothing is written."""
    from ldm.checkpoints.load import build_model

    batches = plan.batches()
    first = _next_number(Path(opt.outdir))
    yield f"{len(plan)} images in {len(batches)} batches of up to {opt.n_samples}"
    for batch in batches[:SHOWN]:
        yield _batch(plan, batch, first)
    if len(batches) > SHOWN:
        yield f"... and {len(batches) - SHOWN} more batches"
    folder = printable(Path(opt.outdir) / "samples")
    names = (
        "no files of their own (--skip_save)" if opt.skip_save else _numbers(range(first, first + len(plan)))
    )
    yield f"files in {folder}: {names}"
    if plan.wishes.sweep is not None:
        yield f"labelled sheets: {len(list(plan.sheets()))}"
    yield from _starting_pictures(plan)
    model = build_model(config)
    yield from _cut_prompts(plan, model)
    yield from _costs(opt, plan, model, device, precision)


def _batch(plan: Plan, batch: Sequence[int], first: int) -> str:
    jobs = [plan[i] for i in batch]
    job = jobs[0]
    scales = ", ".join(f"{scale:g}" for scale in dict.fromkeys(j.scale for j in jobs))
    prompts = [printable(prompt)[:60] for prompt in dict.fromkeys(j.prompt for j in jobs)]
    more = f" and {len(prompts) - 1} more" if len(prompts) > 1 else ""
    return (
        f"{_numbers([first + i for i in batch])}: {job.width}x{job.height}, {count_steps(job)} steps, {job.sampler}, "
        f"scale {scales}, seed {_ranges([j.seed for j in jobs])}: {prompts[0]}{more}"
    )


def _numbers(numbers: Sequence[int]) -> str:
    """Names of files, as a range where they follow one another."""
    return ", ".join(f"{a:05d}.png" if a == b else f"{a:05d}.png to {b:05d}.png" for a, b in _runs(numbers))


def _ranges(numbers: Sequence[int]) -> str:
    return ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in _runs(numbers))


def _runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """First and last of each stretch in which numbers count up by one."""
    for _, run in itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        stretch = [number for _, number in run]
        yield stretch[0], stretch[-1]


def _next_number(outdir: Path) -> int:
    """The number behind the highest sample that is there now."""
    try:
        names = os.listdir(outdir / "samples")
    except OSError:
        return 0
    return (
        max(
            (int(match[1]) for match in map(re.compile(r"([0-9]{5,})\.png").fullmatch, names) if match),
            default=-1,
        )
        + 1
    )


def _starting_pictures(plan: Plan) -> Iterator[str]:
    """What becomes of the sizes of pictures to start from."""
    inits = dict.fromkeys(job.init for job in plan.kinds() if job.init is not None)
    for init in inits:
        canvas = plan.canvases(init)
        height, width, _ = canvas.pixels.shape
        notes = "".join(f"; {note}" for note in canvas.notes)
        yield f"{printable(init.image)} becomes {width}x{height}{notes}"


def _cut_prompts(plan: Plan, model: LatentDiffusion) -> Iterator[str]:
    """Prompts that are too long."""
    cut_words = getattr(model.cond_stage_model, "cut_words", None)  # another package's text model may lack it
    prompts = dict.fromkeys(job.prompt for job in plan.kinds() if job.prompt_syntax == "plain")
    cuts = [(prompt, cut) for prompt in prompts if cut_words and (cut := cut_words(prompt))]
    for prompt, cut in cuts[:SHOWN]:
        yield f"too long, so cut off: {printable(cut)[:200]} (of {printable(prompt)[:40]}...)"
    if len(cuts) > SHOWN:
        yield f"... and {len(cuts) - SHOWN} more prompts are too long"


# --- memory and time --------------------------------------------------------------------------------------------


def _costs(
    opt: argparse.Namespace, plan: Plan, model: LatentDiffusion, device: torch.device, precision: Precision
) -> Iterator[str]:
    """What the run takes, by the model without weights and a trial of the device."""
    from ldm.runtime.estimate import NetworkWork, measure_pace

    batches, work = batch_kinds(plan), NetworkWork(model)
    steps = sum(times * count_steps(batch.job) for batch, times in batches.items())
    try:
        memory = needed_memory(opt, batches, model, work, device, precision.dtype)
        pace = lru_cache(maxsize=None)(partial(measure_pace, device))
        seconds = run_seconds(batches, count_texts(plan), work, pace, precision.dtype)
    except RuntimeError as error:  # a network of another package may need its weights
        yield f"time and memory: unknown, the model does not run without its weights ({printable(error)[:80]})"
        return
    at_once = parallel(opt, device, sum(batches.values()))
    yield tell_memory(memory, PROGRAM if device.type == "cpu" else 0)
    yield tell_time(
        seconds / at_once,
        f"{f'{at_once} of ' if at_once > 1 else ''}{device} in {precision.name}",
        steps,
        ["reading the weights at each step" if opt.lowmem else "reading the weights"]
        + (["compiling"] if opt.compile else []),
    )


def tell_memory(memory: Memory, program: int) -> str:
    """In words; `program` are the bytes of all that is no tensor."""
    total = memory.weights + memory.computed + program
    unit, size = ("GiB", 2**30) if total >= 2**30 else ("MiB", 2**20)
    parts = [
        f"{_short(memory.weights / size)} weights",
        f"{_short(memory.computed / size)} for {memory.peak}",
    ]
    parts += [f"{_short(program / size)} for the program"] if program else []
    return f"memory: about {_short(total / size)} {unit} ({', '.join(parts)})"


def tell_time(seconds: float, where: str, steps: int, apart: Sequence[str]) -> str:
    """In words; `apart` is what the seconds leave out."""
    units = (("s", 1), ("min", 60), ("h", 3600))
    unit, size = next((unit for unit in units if seconds < 99.5 * unit[1]), units[-1])
    return (
        f"time: about {_short(seconds / size)} {unit} on {where} "
        f"({steps} denoising steps of batches; a rough estimate, {' and '.join(apart)} apart)"
    )


def _short(value: float) -> str:
    """A number with two digits, and nothing behind the point from 10 on."""
    rounded = float(f"{value:.2g}")
    return f"{rounded:.1f}" if 0.1 <= rounded < 10 else f"{rounded:g}"
