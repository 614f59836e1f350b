"""Prompts that change from step to step, and prompts joined by AND, by the rules of AUTOMATIC1111's web UI.

[from:to:when], [to:when] and [from::when] change after the step `when`, or with a decimal point in it after that
share of the steps; [a|b|c] takes the next of its texts at each step. AND joins prompts, each with a weight after a
colon at its end. All of these can hold others, and a backslash before a character makes it a letter.
"""

from __future__ import annotations

import bisect
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ldm.job import Job
from ldm.models.diffusion.passes import schedule_length
from ldm.util import InputError

MAX_DEPTH = 100  # of open brackets
TOO_DEEP = f"the prompt has more than {MAX_DEPTH} open brackets; close them or write \\("

_AND = re.compile(r"\bAND\b")
_WEIGHT = re.compile(r"\s*:\s*([-+]?(?:\d+\.?|\d*\.\d+))\s*$", re.ASCII)
_WHEN = re.compile(r"\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*\]", re.ASCII)
_LETTERS = re.compile(r"(?:[^\\\[\]():|]|\\.)+")


@dataclass(frozen=True, slots=True)
class Timeline:
    """The steps of a pass: their number, and those of the passes before, from which a `when` counts.

    Of a share the passes before are 1. An upscaled pass begins at the end of the first one's `steps`.
    """

    steps: int
    before: int = 0

    def last_step(self, when: str) -> int:
        """Returns the last step before a change, from 1; 0 and less if it comes before the first."""
        value = float(when)
        passed = 1.0 if self.before else 0.0
        value = (value - passed) * self.steps if "." in when else value - self.before
        return int(max(min(value, self.steps), -1))


@dataclass(frozen=True, slots=True)
class Part:
    """One of the prompts that AND joins: its texts, each with the last step that has it, and its weight.

    Steps count from 0. The last text has the steps that are left.
    """

    texts: tuple[tuple[int, str], ...]
    weight: float = 1.0

    def at(self, step: int) -> str:
        """Returns the text of a step."""
        place = bisect.bisect_left(self.texts, (step, ""))
        return self.texts[min(place, len(self.texts) - 1)][1]


def parts_of(prompt: str, timeline: Timeline) -> list[Part]:
    """Returns the prompts that AND joins, in their order; one without it.

    The web UI counts the steps from 0 and changes after the step `when`, which is one later than its documentation
    has it: [a:b:3] has 4 steps of `a`, and [a|b] begins with two of them. A text that its grammar does not cover
    (a bar outside of brackets, a backslash at the end) is not read at all. Weights are finite.
    """
    parts: list[Part] = []
    for text in _AND.split(prompt):
        match = _WEIGHT.search(text)
        text = text[: match.start()] if match else text.rstrip()
        weight = float(match[1]) if match else 1.0
        if not math.isfinite(weight):
            raise InputError(
                "a weight after the last colon of the prompt is not a finite number; use a smaller one"
            )
        parts.append(Part(tuple(changes_of(text, timeline)), weight))
    return parts


def without_weight(text: str) -> str:
    """Returns a prompt that `parts_of` reads with this text, also if a colon and a number end it."""
    return f"{text}:1" if _WEIGHT.search(text) else text


def changes_or_joins(prompt: str, negative: str = "") -> bool:
    """Whether two prompts hold more than one text, or a weight of the first as a whole, in the web UI's syntax."""
    script = Script.of(Job(prompt, negative, prompt_syntax="a1111"))
    return script.is_composed or len(script.texts()) > 2


@dataclass(frozen=True, slots=True)
class Script:
    """The prompts of a job in one pass. AND joins prompts in the prompt only, as in the web UI."""

    parts: tuple[Part, ...]
    negative: Part

    @classmethod
    def of(cls, job: Job, upscaled: bool = False) -> Script:
        """The script of a job's first pass, or of its upscaled one. `InputError` as in `parts_of`."""
        steps = schedule_length(job) if job.sigmas or job.timesteps else job.steps
        if job.prompt_syntax == "plain":
            return cls((Part(((steps, job.prompt),)),), Part(((steps, job.negative_prompt),)))
        timeline = Timeline(steps, steps if upscaled else 0)
        parts = parts_of(job.prompt, timeline)
        return cls(tuple(parts), Part(tuple(changes_of(job.negative_prompt, timeline))))

    @property
    def is_composed(self) -> bool:
        """Whether the prompt is more than one, or has a weight."""
        return len(self.parts) > 1 or any(part.weight != 1 for part in self.parts)

    def texts(self) -> list[str]:
        """Returns all texts, in the order of the parts, those of the negative prompt last."""
        return [text for part in (*self.parts, self.negative) for _, text in part.texts]

    def ends(self) -> set[int]:
        """Returns the last step of each text."""
        return {end for part in (*self.parts, self.negative) for end, _ in part.texts}


def scripts_of(job: Job) -> list[Script]:
    """Returns the script of each pass of a job."""
    return [Script.of(job), *([Script.of(job, upscaled=True)] if job.upscale > 1 else [])]


def changes_of(text: str, timeline: Timeline) -> list[tuple[int, str]]:
    """Returns the texts that a prompt has during a pass, each with its last step, from 1; the last has all steps.

    `InputError` for more than 100 brackets in one another.
    """
    try:
        pieces = _Reader(text).read()
    except _Unreadable:
        return [(timeline.steps, text)]
    ends = {timeline.steps, *_ends(pieces, timeline)}
    found: list[tuple[int, str]] = []
    for end in sorted(end for end in ends if end >= 1):
        now = "".join(_texts(pieces, end, timeline))
        if found and found[-1][1] == now:
            found.pop()
        found.append((end, now))
    return found


@dataclass(frozen=True, slots=True)
class _Change:
    """[before:after:when]."""

    before: Pieces
    after: Pieces
    when: str


@dataclass(frozen=True, slots=True)
class _Turns:
    """[a|b|c]."""

    texts: tuple[Pieces, ...]


Pieces = Sequence["str | _Change | _Turns"]


def _ends(pieces: Pieces, timeline: Timeline) -> Iterator[int]:
    """Yields the steps, from 1, after which the text of the pieces can change."""
    for piece in pieces:
        if isinstance(piece, _Change):
            yield timeline.last_step(piece.when)
            yield from itertools.chain(_ends(piece.before, timeline), _ends(piece.after, timeline))
        elif isinstance(piece, _Turns):
            yield from range(1, timeline.steps + 1)


def _texts(pieces: Pieces, step: int, timeline: Timeline) -> Iterator[str]:
    """Yields the texts of a step, which counts from 1."""
    for piece in pieces:
        if isinstance(piece, str):
            yield piece
        elif isinstance(piece, _Turns):
            yield from _texts(piece.texts[(step - 1) % len(piece.texts)], step, timeline)
        else:
            before = step <= timeline.last_step(piece.when)
            yield from _texts(piece.before if before else piece.after, step, timeline)


class _Unreadable(Exception):
    """The web UI reads such a text as it is."""


class _Reader:
    """Reads the brackets of a text. One that does not fit the grammar is a letter outside of all others."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._read: dict[
            int, tuple[Pieces, int] | None
        ] = {}  # brackets, by their place: a text can be read again

    def read(self) -> Pieces:
        pieces, at = list[str | _Change | _Turns](), 0
        while at < len(self._text):
            more, end = self._several(at, 1)
            pieces += more
            if end < len(self._text):
                if self._text[end] not in "[]():":
                    raise _Unreadable
                pieces.append(self._text[end])
                end += 1
            at = end
        return pieces

    def _several(self, at: int, depth: int) -> tuple[Pieces, int]:
        """Reads letters and whole brackets; returns them, and where they end."""
        pieces = list[str | _Change | _Turns]()
        while True:
            if match := _LETTERS.match(self._text, at):
                pieces.append(match[0])
                at = match.end()
            elif self._next(at) in ("(", "[") and (found := self._bracket(at, depth)):
                pieces += found[0]
                at = found[1]
            else:
                return pieces, at

    def _next(self, at: int) -> str:
        return self._text[at : at + 1]

    def _bracket(self, at: int, depth: int) -> tuple[Pieces, int] | None:
        if at not in self._read:
            if depth > MAX_DEPTH:
                raise InputError(TOO_DEEP)
            self._read[at] = (self._round if self._text[at] == "(" else self._square)(at, depth + 1)
        return self._read[at]

    def _round(self, at: int, depth: int) -> tuple[Pieces, int] | None:
        """Reads (text) or (text:weight), which stay as they are but for what they hold."""
        inside, end = self._several(at + 1, depth)
        pieces = ["(", *inside]
        if self._next(end) == ":":
            more, end = self._several(end + 1, depth)
            pieces += [":", *more]
        return ([*pieces, ")"], end + 1) if self._next(end) == ")" else None

    def _square(self, at: int, depth: int) -> tuple[Pieces, int] | None:
        first, end = self._several(at + 1, depth)
        if self._next(end) == "]":
            return ["[", *first, "]"], end + 1
        if self._next(end) == "|":
            return self._turns(first, end, depth)
        if self._next(end) != ":":
            return None
        if when := _WHEN.match(self._text, end + 1):
            return [_Change((), first, when[1])], when.end()
        second, end = self._several(end + 1, depth)
        when = _WHEN.match(self._text, end + 1) if self._next(end) == ":" else None
        return ([_Change(first, second, when[1])], when.end()) if when else None

    def _turns(self, first: Pieces, end: int, depth: int) -> tuple[Pieces, int] | None:
        texts = [first]
        while self._next(end) == "|":
            more, end = self._several(end + 1, depth)
            texts.append(more)
        return ([_Turns(tuple(texts))], end + 1) if self._next(end) == "]" else None
