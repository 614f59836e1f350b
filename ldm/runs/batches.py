"""Samples the batches of a plan in order; with --on_oom halve in halves if memory runs out."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from ldm.job import Job
from ldm.runs.checks import count_steps
from ldm.runs.options import RunOptions
from ldm.runs.plan import Plan
from ldm.runs.progress import Progress
from ldm.runs.run_file import RunFile
from ldm.util import is_out_of_memory

if TYPE_CHECKING:
    from torch import Tensor

    from ldm.models.diffusion.noise import NoiseSource
    from ldm.pipeline import Pending, Pipeline, StepInfo
    from ldm.runs.previews import Previews

logger = logging.getLogger("ldm")

Begin = Callable[[Sequence[int]], "list[Pending]"]


class Halves:
    """Makes a batch whole or, if memory runs out and it is allowed, in halves, recursively.

    The parts are recorded in the run's file, since the last bits depend on them: --resume repeats them.
    """

    def __init__(self, options: RunOptions, run: RunFile, progress: Progress) -> None:
        self._allowed, self._run, self._progress = options.on_oom == "halve", run, progress
        self._fitting: int | None = None  # images of a batch, once memory has run out

    def make(
        self, indices: Sequence[int], job: Job, begin: Begin
    ) -> Iterator[tuple[list[int], list[Pending]]]:
        """Yields the parts of a batch of jobs, each begun."""
        sizes = self._sizes(indices)
        if len(sizes) > 1:
            self._progress.more_steps((len(sizes) - 1) * count_steps(job))
            self._run.note_parts(indices[0], sizes)
        done: list[int] = []
        while sizes:
            start, taken = sum(done), self._progress.taken
            part = list(indices[start : start + sizes[0]])
            pending = self._try(part, begin)
            if pending is not None:
                done.append(sizes.pop(0))
                yield part, pending
                continue
            self._fitting = -(-len(part) // 2)
            sizes = _in_parts(sum(sizes), self._fitting)
            logger.warning(
                "out of memory with %d images at a time; continuing with %d", len(part), self._fitting
            )
            self._run.note_parts(indices[0], [*done, *sizes])
            expected = self._progress.taken - taken + count_steps(job) * (len(done) + len(sizes) - 1)
            self._progress.more_steps(expected)

    def _sizes(self, indices: Sequence[int]) -> list[int]:
        """Returns the sizes of the parts in which a batch is begun."""
        noted = self._run.parts_of(indices[0])
        if noted and sum(noted) == len(indices):
            return list(noted)
        return _in_parts(len(indices), self._fitting or len(indices))

    def _try(self, part: list[int], begin: Begin) -> list[Pending] | None:
        """Begins a part and returns its result; None if memory ran out, after it has been freed."""
        try:
            return begin(part)
        except Exception as error:
            if not self._allowed or len(part) == 1 or not is_out_of_memory(error):
                raise
        import torch

        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None


def _in_parts(count: int, size: int) -> list[int]:
    """Splits a number of images into parts of one size; the last has the rest."""
    return [min(size, count - start) for start in range(0, count, size)]


def generate(
    options: RunOptions,
    pipeline: Pipeline,
    plan: Plan,
    batches: Sequence[list[int]],
    progress: Progress,
    halves: Halves,
    stopped: Callable[[], bool],
    previews: Previews | None = None,
) -> Iterator[tuple[list[int], list[Pending]]]:
    """Yields the numbers and the begun images of the given batches of a plan, until the run is `stopped`.

    In seed mode "batch" one stream of noise serves all.
    """
    noise = code = None
    wanted = {batch[0] for batch in batches}
    one_stream = plan[0].seed_mode == "batch"
    for indices in plan.batches() if one_stream else batches:
        if stopped():
            return
        jobs = [plan[i] for i in indices]
        if plan.stream is not None:
            noise, code = pipeline.enter(jobs[0], plan.stream)
        elif one_stream:
            noise = noise or pipeline.noise(jobs, options.n_samples if options.fixed_code else None)
            if indices[0] not in wanted:
                pipeline.skip(jobs, noise)
                continue
        yield from halves.make(
            indices, jobs[0], partial(_begin, pipeline, plan, progress, previews, noise, code)
        )


def _begin(
    pipeline: Pipeline,
    plan: Plan,
    progress: Progress,
    previews: Previews | None,
    noise: NoiseSource | None,
    code: Tensor | None,
    part: Sequence[int],
) -> list[Pending]:
    def on_step(step: StepInfo) -> None:
        progress.step(step)
        if previews is not None:
            previews.step(step)

    progress.begin(len(part))
    if previews is not None:
        previews.begin(part)
    begun = pipeline.begin([plan[i] for i in part], noise, code, on_step)
    if previews is not None:
        previews.end()
    progress.end(len(part))
    return begun
