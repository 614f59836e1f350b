"""--dry_run: describes what a run would make, without loading its model."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.metadata.infotext import file_name
from ldm.runs.checks import count_steps
from ldm.runs.claim import Claim
from ldm.runs.estimate import batch_kinds, count_texts, parallel, run_seconds
from ldm.runs.existing import Present
from ldm.runs.memory import Memory, beyond_memory, needed_memory, program_bytes
from ldm.runs.options import RunOptions
from ldm.runs.plan import Plan
from ldm.runs.prepare import Prepared
from ldm.runs.processes import ProcessInfo
from ldm.runs.progress import Events
from ldm.runs.source import Source
from ldm.util import printable

if TYPE_CHECKING:
    import torch

    from ldm.models.diffusion.ddpm import LatentDiffusion
    from ldm.runtime.device import Precision

SHOWN = 50  # batches, and prompts that are cut


def show(prepared: Prepared, events: Events) -> int:
    """Prints the plan of a run, or with --json emits it as an event; returns the exit code."""
    facts: dict[str, Any] = {}
    options = prepared.options
    lines = preview(options, prepared.plan, prepared.source(ProcessInfo(prepared.device)), facts)
    if options.json:
        text = list(lines)
        events.emit("plan", **facts, text=text)
        return 0
    for line in lines:
        print(line)
    return 0


def preview(
    options: RunOptions, plan: Plan, source: Source, facts: dict[str, Any] | None = None
) -> Iterator[str]:
    """Yields a line each on images, batches, sizes, cut prompts, memory and time. Reads no weights, writes nothing.

    With --resume only the missing images of the run that would continue count. `facts` receives the numbers, by name.
    """
    from ldm.checkpoints.load import build_model

    facts = {} if facts is None else facts
    first, existing = _begun(options, plan, source)
    batches = [batch for batch in plan.batches() if any(i not in existing for i in batch)]
    new = [first + i for i in range(len(plan)) if i not in existing]
    facts |= {"folder": str(options.outdir), "images": len(plan), "existing": len(existing), "first": first}
    facts["batches"] = len(batches)
    if not batches:
        yield f"nothing to do: all {len(plan)} images exist"
        return
    there = f"; {len(existing)} of {len(plan)} exist" if existing else ""
    yield f"{_count(len(new), 'image')} in {_count(len(batches), 'batch')} of up to {options.n_samples}{there}"
    for batch in batches[:SHOWN]:
        yield _batch(plan, batch, first)
    if len(batches) > SHOWN:
        yield f"... and {len(batches) - SHOWN} more batches"
    folder = printable(Path(options.outdir) / "samples")
    yield f"files in {folder}: {'no files of their own (--skip_save)' if options.skip_save else _numbers(new)}"
    if options.preview or options.animate:
        yield f"previews in {printable(Path(options.outdir) / 'previews')}, where no safety check runs"
    if plan.prompts.sweep is not None:
        yield f"labelled sheets: {len(list(plan.sheets()))}"
    yield from _starting_images(plan)
    model = build_model(source.config)
    yield from _cut_prompts(plan, model)
    yield from _costs(options, plan, batches, model, source.here.device, source.precision, facts)


def _begun(options: RunOptions, plan: Plan, source: Source) -> tuple[int, set[int]]:
    """Returns the number of the run's first image, and the existing images, which only --resume can have."""
    from ldm.images.writer import RunFolder

    folder = RunFolder(options.outdir, look_only=True)
    if options.resume and folder.samples_path.is_dir():
        run = Claim(options, folder, plan, source).find()
        if run is not None:
            return run.first, Present(run, options.verify).whole
    return folder.next_number("sample"), set()


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{('es' if thing.endswith('ch') else 's') * (number != 1)}"


def _batch(plan: Plan, batch: Sequence[int], first: int) -> str:
    jobs = [plan[i] for i in batch]
    job = jobs[0]
    scales = ", ".join(f"{scale:g}" for scale in dict.fromkeys(j.scale for j in jobs))
    prompts = [printable(prompt)[:60] for prompt in dict.fromkeys(j.prompt for j in jobs)]
    more = f" and {len(prompts) - 1} more" if len(prompts) > 1 else ""
    left_out = [f"cache_steps {','.join(map(str, job.cache_steps))}"] if job.cache_steps else []
    left_out += [f"merge_tokens {job.merge_tokens:g}"] if job.merge_tokens else []
    approximate = f"approximate by {' and '.join(left_out)}, " if left_out and not job.is_exact else ""
    return (
        f"{_numbers([first + i for i in batch])}: {job.width}x{job.height}, {count_steps(job)} steps, {job.sampler}, "
        f"{approximate}scale {scales}, seed {_ranges([j.seed for j in jobs])}: {prompts[0]}{more}"
    )


def _numbers(numbers: Sequence[int]) -> str:
    """Formats names of files, as a range if they are consecutive."""
    return ", ".join(f"{a:05d}.png" if a == b else f"{a:05d}.png to {b:05d}.png" for a, b in _runs(numbers))


def _ranges(numbers: Sequence[int]) -> str:
    return ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in _runs(numbers))


def _runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yields first and last of each stretch of consecutive numbers."""
    for _, run in itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        stretch = [number for _, number in run]
        yield stretch[0], stretch[-1]


def _starting_images(plan: Plan) -> Iterator[str]:
    """Yields how starting images are resized."""
    inits = dict.fromkeys(job.init for job in plan.kinds() if job.init is not None)
    for init in inits:
        canvas = plan.canvases(init)
        height, width, _ = canvas.pixels.shape
        notes = "".join(f"; {note}" for note in canvas.notes)
        yield f"{printable(init.image)} becomes {width}x{height}{notes}"


def _cut_prompts(plan: Plan, model: LatentDiffusion) -> Iterator[str]:
    """Yields the prompts that are too long."""
    cut_words = getattr(
        model.cond_stage_model, "cut_words", None
    )  # another package's text encoder may lack it
    prompts = dict.fromkeys(job.prompt for job in plan.kinds() if job.prompt_syntax == "plain")
    cuts = [(prompt, cut) for prompt in prompts if cut_words and (cut := cut_words(prompt))]
    for prompt, cut in cuts[:SHOWN]:
        yield f"too long, so cut off: {printable(cut)[:200]} (of {printable(prompt)[:40]}...)"
    if len(cuts) > SHOWN:
        yield f"... and {len(cuts) - SHOWN} more prompts are too long"


# --- memory and time --------------------------------------------------------------------------------------------


def _costs(
    options: RunOptions,
    plan: Plan,
    missing: Sequence[Sequence[int]],
    model: LatentDiffusion,
    device: torch.device,
    precision: Precision,
    facts: dict[str, Any],
) -> Iterator[str]:
    """Yields the cost of the run, from the model without weights and a trial of the device."""
    from ldm.models.diffusion.ddpm import LatentEditDiffusion
    from ldm.runtime.estimate import NetworkWork, measure_pace

    edits = isinstance(model, LatentEditDiffusion)
    batches, work = batch_kinds(plan, missing, model.embeds_guidance, edits), NetworkWork(model)
    steps = sum(times * count_steps(batch.job) for batch, times in batches.items())
    try:
        memory = needed_memory(options, batches, model, work, device, precision)
        pace = lru_cache(maxsize=None)(partial(measure_pace, device))
        seconds = run_seconds(batches, count_texts(plan), work, pace, precision)
    except RuntimeError as error:  # a network of another package may need its weights
        yield f"time and memory: unknown, the model does not run without its weights ({printable(error)[:80]})"
        return
    at_once, program = parallel(options, device, sum(batches.values())), program_bytes(device)
    facts |= {
        "memory": round(memory.weights + memory.computed + program),
        "seconds": round(seconds / at_once, 1),
    }
    yield tell_memory(memory, program)
    too_much = beyond_memory(memory, device, max(batch.images for batch in batches))
    if too_much is not None:
        yield f"too much: {too_much}"
    yield tell_time(
        seconds / at_once,
        f"{f'{at_once} of ' if at_once > 1 else ''}{device} in {precision.name}",
        steps,
        options.compile,
    )


def tell_memory(memory: Memory, program: int) -> str:
    """Describes the memory in words; `program` are the bytes of everything that is not a tensor."""
    total = memory.weights + memory.computed + program
    unit, size = ("GiB", 2**30) if total >= 2**30 else ("MiB", 2**20)
    added = [
        f"{_short(number / size)} of {printable(file_name(name))[:60]}"
        for name, number in memory.added.items()
    ]
    parts = [
        f"{_short(memory.weights / size)} weights",
        *([f"among them {' and '.join(added)}"] if added else []),
        f"{_short(memory.computed / size)} for {memory.peak}",
    ]
    parts += [f"{_short(program / size)} for the program"] if program else []
    return f"memory: about {_short(total / size)} {unit} ({', '.join(parts)})"


def tell_time(seconds: float, where: str, steps: int, compiles: bool = False) -> str:
    """Describes the time in words; the seconds exclude loading and compiling the model."""
    units = (("s", 1), ("min", 60), ("h", 3600))
    unit, size = next((unit for unit in units if seconds < 99.5 * unit[1]), units[-1])
    without = "without loading the model" + (" and compiling it" if compiles else "")
    return (
        f"time: about {_short(seconds / size)} {unit} on {where} "
        f"({_count(steps, 'step')}; rough estimate, {without})"
    )


def _short(value: float) -> str:
    """Formats a number with two digits, without decimals from 10 on."""
    rounded = float(f"{value:.2g}")
    return f"{rounded:.1f}" if 0.1 <= rounded < 10 else f"{rounded:g}"
