"""Plans a run: prompts, sweeps and starting images become jobs, numbered, seeded and grouped into batches."""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from ldm.job import DEFAULT_STRENGTH, Init, Job, batch_key, batches_of, lora_name, split_loras
from ldm.job_values import override
from ldm.prompts.dialects import read_prompt_list
from ldm.prompts.expand import Sweep, expand_lines, parse_sweep
from ldm.prompts.files import Faults, source_name
from ldm.prompts.lines import Line
from ldm.prompts.notations import warn_of_notations
from ldm.runs.checks import check_syntax
from ldm.runs.options import Request, RunOptions
from ldm.runs.starts import Start
from ldm.seeds import check_seed, counted
from ldm.util import InputError, need, printable

if TYPE_CHECKING:
    from ldm.images.canvas import Canvas
    from ldm.models.diffusion.noise import StreamPlace

logger = logging.getLogger("ldm")

MAX_IMAGES = 1_000_000
OF_THE_RUN = ("seed_mode", "batch_index")  # fields that a line cannot set
_OF_PROMPTS = ("prompt", "negative_prompt", "prompt_syntax")
_MOST_FAULTS = 1_000


@dataclass(frozen=True, slots=True)
class RequestedPrompts:
    """The requested prompts, as lines of the list or of --prompt, and the sweep; `faults` are of the lines."""

    faults: Faults
    lines: Sequence[Line]
    sweep: Sweep | None

    @property
    def combinations(self) -> list[dict[str, Any]]:
        """The changes of each job of an image, by field; one without changes if there is no sweep."""
        return list(self.sweep.overrides()) if self.sweep else [{}]


def read_prompts(options: RunOptions, request: Request) -> RequestedPrompts:
    """Reads the prompt of the request, or those of its file, expanded. The plan reports all their faults at once."""
    sweep = parse_sweep(request.sweep) if request.sweep else None
    if request.from_file is None:
        faults = Faults()
        lines = [Line(1, request.job.prompt, count=options.images_per_prompt or options.n_samples)]
    else:
        faults = Faults(source_name(request.from_file), request.first_line)
        source = request.from_file if request.given is None else request.given
        lines = read_prompt_list(source, request.prompt_format, faults)
        if options.images_per_prompt is not None:
            lines = [replace(line, count=line.count * options.images_per_prompt) for line in lines]
    return RequestedPrompts(faults, expand_lines(lines, faults) if request.expand else lines, sweep)


class Plan(Sequence[Job]):
    """The jobs of a run, made on access; that of image i of the run is `plan[i]`.

    Each of `starts` is repeated n_iter times, in rounds. A round holds the images of the lines in order, and each
    image once for every combination of the sweep. Image number i, sweeps not counted, has the seed of the run + i
    unless its line or the sweep sets another; `suit` adds to each job what its model needs. Raises InputError, with
    all faults of the lines, for jobs that cannot be made.
    """

    stream: StreamPlace | None = None

    def __init__(
        self,
        options: RunOptions,
        request: Request,
        prompts: RequestedPrompts,
        starts: Sequence[Start],
        canvases: Callable[[Init], Canvas],
        check: Callable[[Job], None] = lambda job: None,
        suit: Callable[[Job], Job] = lambda job: job,
    ) -> None:
        self.prompts, self.combinations = prompts, prompts.combinations
        self._options, self._request = options, request
        self._starts, self.canvases, self._suit = starts, canvases, suit
        self._given = tuple(
            (lora_name(Path(path).name), weight, on_text) for path, weight, on_text in options.lora
        )
        per_round = sum(line.count * max(len(line.seeds), 1) for line in prompts.lines) * len(
            self.combinations
        )
        count = per_round * options.n_iter * len(starts)
        need(count <= MAX_IMAGES, f"this would be {count} images; ask for at most {MAX_IMAGES} in a run")
        self._seeds = [own for line in prompts.lines for own in _own_seeds(line)]
        self._round_size, self._rounds = per_round, options.n_iter * len(starts)
        self._round = lru_cache(maxsize=1)(self._make_round)
        self._check(check)

    def __len__(self) -> int:
        return self._round_size * self._rounds

    @overload
    def __getitem__(self, index: int) -> Job: ...
    @overload
    def __getitem__(self, index: slice) -> list[Job]: ...
    def __getitem__(self, index: int | slice) -> Job | list[Job]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        number, place = divmod(index, self._round_size)
        job = self._round(number // self._options.n_iter)[place]
        seed, offset = self._seed(number, place // len(self.combinations), job)
        job = counted(replace(job, seed=seed), offset)
        return replace(job, batch_index=index if self._request.job.seed_mode == "batch" else 0)

    def _seed(self, number: int, image: int, job: Job) -> tuple[int, int]:
        """Returns the seed of an image of a round, both counted from 0, and by how much it counts up.

        `job` is the image's but for the seed.
        """
        own, first = self._seeds[image], self._request.job.seed
        if "seed" in self.combinations[0]:
            return job.seed, 0
        if own is not None:
            return own
        if self._request.job.seed_mode == "batch":
            return first, 0
        if self._options.fixed_code:
            return first, image % self._options.n_samples
        return first, number * len(self._seeds) + image

    def batches(self) -> list[list[int]]:
        """Returns the batches: up to n_samples images that differ in prompts, seeds and scales at most."""
        return self._batches

    def wanted(self) -> list[list[int]]:
        """Returns the batches to be made; the noise of the others is skipped where all share one stream."""
        return self.batches()

    @cached_property
    def _batches(self) -> list[list[int]]:
        return [
            [self._round_size * (start * self._options.n_iter + i) + place for place in batch]
            for start in range(len(self._starts))
            for batches in [batches_of(self._round(start), self._options.n_samples)]
            for i in range(self._options.n_iter)
            for batch in batches
        ]

    def kinds(self) -> Iterator[Job]:
        """Yields the jobs of the run but for their seeds, each at least once."""
        for start in range(len(self._starts)):
            yield from self._round(start)

    def finished_size(self, job: Job) -> tuple[int, int]:
        """Returns height and width of the image of a job: a region around a mask is put back into the whole."""
        height, width = job.upscaled_size
        if job.init is not None and job.init.crop_to_mask is not None:
            height, width = self.canvases(job.init).finished_size
        if self._options.upscaler is None or job.upscale > 1:
            return height, width

        from ldm.pipeline.upscaler import load_upscaler

        scale = load_upscaler(self._options.upscaler).scale
        return height * scale, width * scale

    def loras(self) -> list[str]:
        """Returns the names of all LoRAs of the run."""
        return list(dict.fromkeys(name for job in self.kinds() for name, _, _ in job.loras))

    def controls(self) -> list[str]:
        """Returns the names of the files of all control networks of the run."""
        return list(dict.fromkeys(file for job in self.kinds() for file, *_ in job.controls))

    def sheets(self) -> Iterator[tuple[str, list[int]]]:
        """Returns the title and the images, row by row, of each sheet of a sweep."""
        sweep = self.prompts.sweep
        if sweep is None:
            return
        size = len(sweep.rows) * len(sweep.columns)
        for first in range(0, len(self), size):
            job = self[first]
            what = [] if "prompt" in self.combinations[0] else [job.prompt]
            what += [] if "seed" in self.combinations[0] else [f"seed={job.seed}"]
            caption = sweep.sheets[first // size % len(sweep.sheets)]
            yield ", ".join(filter(None, [caption, *reversed(what)])), list(range(first, first + size))

    # --- from lines to jobs ---------------------------------------------------------------------------------

    def _make_round(self, start: int) -> list[Job]:
        """Returns the jobs of a round by their positions; those of one line and combination are the same object."""
        base = self._base(self._starts[start])
        jobs: list[Job] = []
        for line in self.prompts.lines:
            of_line = [self._suit(self._job(line, combination, base)) for combination in self.combinations]
            jobs += of_line * (line.count * max(len(line.seeds), 1))
        return jobs

    def _base(self, start: Start) -> Job:
        """Returns the job of a start, which a line and a combination change."""
        job = replace(self._request.job, width=start.width, height=start.height, loras=self._given)
        return replace(job, init=start.init) if start.init is not None else replace(job, strength=1.0)

    def _job(self, line: Line, combination: Mapping[str, Any], base: Job) -> Job:
        """Returns the job of a line and a combination, without its seed. Raises ValueError or `InputError`."""
        values = {"prompt": line.prompt, **line.overrides, **combination}
        if self._options.lora_dir is not None:
            values["prompt"], loras = _split_tags(values["prompt"])
            if loras:
                values["loras"] = (*values.get("loras", base.loras), *loras)
        if len(values) == 1:
            return replace(base, prompt=values["prompt"])
        return self._with_image(override(base, values), values, base)

    def _with_image(self, job: Job, values: Mapping[str, Any], base: Job) -> Job:
        """Returns the job in the size of its starting image, if it has one, fitted to --W and --H."""
        need(
            job.init is not None or "strength" not in values,
            "a strength needs an image to start from; give one with --init-img or leave it out",
        )
        if job.init is None:
            return replace(job, strength=1.0)
        init = job.init
        asked = {name: values[name] for name in ("width", "height") if name in values}
        if asked:
            usual = "fill" if len(asked) == 2 else "fit"
            resize = init.resize if "init.resize" in values or init.resize != "none" else usual
            init = replace(init, **asked, resize=resize)
        if base.init is None:
            job = replace(job, strength=values.get("strength", DEFAULT_STRENGTH))
        if init == base.init:
            return job
        height, width, _ = self.canvases(init).pixels.shape
        return replace(job, init=init, width=width, height=height)

    def _check(self, check: Callable[[Job], None]) -> None:
        """Raises one InputError with all faults of the lines and their jobs."""
        faults: dict[tuple[int, str], None] = {}
        bases = {(start.width, start.height): self._base(start) for start in self._starts}.values()
        refusal = lru_cache(maxsize=1024)(partial(_refusal, check))
        for line, base in itertools.product(self.prompts.lines, bases):
            for combination in self.combinations:
                for fault in self._faults(line, combination, base, refusal):
                    faults[line.number, fault] = None
            if len(faults) >= _MOST_FAULTS:
                break
        for number, fault in faults:
            self.prompts.faults.add(number, fault)
        self.prompts.faults.raise_any()
        eta = max(job.eta or 0.0 for job in self._round(0))
        if eta > 1:
            logger.warning("an eta of %g is above 1: more noise than the method allows for", eta)
        self._warn_of_notations()

    def _warn_of_notations(self) -> None:
        """Warns of notations in the prompts that are plain text here but have a meaning in other programs."""
        request, prompts = self._request, self.prompts
        swept = {name: {c[name] for c in self.combinations if name in c} for name in _OF_PROMPTS}
        tagged = self._options.lora_dir is not None
        for weighted in (False, True):
            lines = [
                line
                for line in prompts.lines
                if weighted == (line.overrides.get("prompt_syntax", request.job.prompt_syntax) == "a1111")
                and not swept["prompt_syntax"]
            ]
            places = [
                f"{prompts.faults.name}, line {line.number}" if prompts.faults.name else "--prompt"
                for line in lines
            ]
            texts = [(place, line.prompt) for place, line in zip(places, lines, strict=True)]
            texts += [("--sweep prompt", text) for text in sorted(swept["prompt"]) if lines]
            negatives = [("--negative_prompt", request.job.negative_prompt)] if lines else []
            negatives += [
                (place, line.overrides["negative_prompt"])
                for place, line in zip(places, lines, strict=True)
                if "negative_prompt" in line.overrides
            ]
            negatives += [
                ("--sweep negative_prompt", text) for text in sorted(swept["negative_prompt"]) if lines
            ]
            warn_of_notations(
                texts,
                negatives,
                expanded=request.expand,
                weighted=weighted,
                tagged=tagged,
            )

    def _faults(
        self, line: Line, combination: Mapping[str, Any], base: Job, refusal: Callable[[Job], str | None]
    ) -> Iterator[str]:
        held = [name for name in (*line.overrides, *combination) if name in OF_THE_RUN]
        if base.seed_mode == "batch":
            held += [name for name in (*line.overrides, *combination) if name in ("rng", "seed")]
            held += ["seed"] if line.seeds else []
        for name in held:
            yield f"{name} holds for the whole run and cannot be set here; leave it out"
        try:
            job = self._job(line, combination, base)
            if job.prompt_syntax == "a1111":
                check_syntax(job)
            for first in (job.seed,) if "seed" in combination else line.seeds or (job.seed,):
                check_seed(first, job.rng)
        except ValueError as error:
            yield str(error)
            return
        if fault := refusal(batch_key(job)):
            yield fault


def _own_seeds(line: Line) -> Iterable[tuple[int, int] | None]:
    """Returns the seeds of a line's images: the seed that it names and the offset of each image from it.

    Returns None where the line names no seed.
    """
    if not line.seeds:
        return itertools.repeat(None, line.count)
    return itertools.product(line.seeds, range(line.count))


def _split_tags(prompt: str) -> tuple[str, tuple[tuple[str, float, float], ...]]:
    text, loras = split_loras(prompt)
    if wrong := _NETWORK.search(text):
        shown = printable(wrong[0][:60])
        if wrong[1].lower() not in ("lora", "lyco"):
            raise InputError(f"{shown} asks for a kind of network that is not supported; leave it out")
        raise InputError(f"{shown} in a prompt is not <lora:NAME:WEIGHT> or <lora:NAME:TEXT:WEIGHT>")
    return text, loras


_NETWORK = re.compile(r"<(lora|lyco|hypernet|ti):[^<>]*>?", re.IGNORECASE)


def _refusal(check: Callable[[Job], None], job: Job) -> str | None:
    try:
        check(job)
    except InputError as error:
        return str(error)
    return None
