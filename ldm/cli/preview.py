"""What a run would make, in words, without its model: --dry_run."""

from __future__ import annotations

import argparse
import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm.cli.plan import Plan, count_steps
from ldm.util import printable

SHOWN = 50  # batches, and prompts that are cut


def show(opt: argparse.Namespace, plan: Plan, config: Mapping[str, Any]) -> int:
    """Prints the plan of a run: the exit code."""
    for line in preview(opt, plan, config):
        print(line)
    return 0


def preview(opt: argparse.Namespace, plan: Plan, config: Mapping[str, Any]) -> Iterator[str]:
    """Images, batches, sizes, memory and cut prompts, a line each. Nothing is written and no weights are read."""
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
    yield from _of_the_model(plan, config)
    steps = sum(count_steps(plan[batch[0]]) for batch in batches)
    yield f"time: {steps} denoising steps of batches; unknown how long one takes here (scripts/benchmark.py tells)"


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


def _of_the_model(plan: Plan, config: Mapping[str, Any]) -> Iterator[str]:
    """Memory of the largest picture, and prompts that are too long, by a model without weights."""
    from ldm.checkpoints.load import build_model
    from ldm.runtime.tiling import needed_memory

    model = build_model(config)
    height, width = max((job.upscaled_size for job in plan.kinds()), key=lambda size: size[0] * size[1])
    needed = needed_memory(model.first_stage_model.widths, height * width) / 2**30
    yield f"memory: decoding {width}x{height} takes about {needed:.2f} GiB beside the weights (estimate, float32)"
    cut_words = getattr(model.cond_stage_model, "cut_words", None)  # another package's text model may lack it
    prompts = dict.fromkeys(job.prompt for job in plan.kinds() if job.prompt_syntax == "plain")
    cuts = [(prompt, cut) for prompt in prompts if cut_words and (cut := cut_words(prompt))]
    for prompt, cut in cuts[:SHOWN]:
        yield f"too long, so cut off: {printable(cut)[:200]} (of {printable(prompt)[:40]}...)"
    if len(cuts) > SHOWN:
        yield f"... and {len(cuts) - SHOWN} more prompts are too long"
