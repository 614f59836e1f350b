"""Progress of a run: a bar or lines for people, JSON events for programs; and the signals that end it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

logger = logging.getLogger("ldm")


class Interrupts:
    """Handles signals: the first Ctrl-C (or TERM, HUP) stops the run after the current batch, the second at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._old: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            # a run under nohup goes on when the terminal closes
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                with contextlib.suppress(ValueError):  # not in the main thread: others handle signals
                    self._old[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: object) -> None:
        if self.received is not None:
            raise SystemExit(128 + number)
        self.received = number
        logger.warning("stopping after this batch; press Ctrl-C again to stop now")


NEWS_SECONDS = 30  # between lines where no terminal shows a bar
EVENT_SECONDS = 1  # between events that count steps


class Progress:
    """A bar over all denoising steps on a terminal; elsewhere a line for each batch, and during long ones.

    All show the time left. For programs the steps are events too, at most one a second.
    """

    def __init__(self, images: int, steps: int, quiet: bool, events: Events) -> None:
        from tqdm import tqdm

        self.images, self.done, self.started = images, 0, time.monotonic()
        self._steps, self.taken, self._events = steps, 0, events
        self._said = self._told = self.started
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

    def more_steps(self, count: int) -> None:
        """Adds steps to the expected total."""
        self._steps += count
        self._bar.total = self._steps

    def step(self, _: object) -> None:
        self._bar.update()
        self.taken, now = self.taken + 1, time.monotonic()
        if now - self._told >= EVENT_SECONDS:
            self._told = now
            self._events.emit("step", step=self.taken, steps=self._steps)
        if self._bar.disable and now - self._said >= NEWS_SECONDS:
            self._said = now
            left = (now - self.started) / self.taken * (self._steps - self.taken)
            logger.info("step %d of %d, %s left", self.taken, self._steps, in_words(left))

    def end(self, count: int) -> None:
        self.done += count
        if self._bar.disable:
            self._said = time.monotonic()
            each = (self._said - self.started) / self.done
            left = in_words(each * (self.images - self.done))
            logger.info("image %d of %d, %.1f s each, %s left", self.done, self.images, each, left)

    def close(self) -> None:
        self._bar.close()


def in_words(seconds: float) -> str:
    """Formats a time for people: 45 s, 12 min, 3 h 20 min."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


class Events:
    """Writes events for programs: one JSON object a line on stdout. A closed stdout never stops the run.

    Each event contains the values of `about`.
    """

    def __init__(self, enabled: bool, about: Mapping[str, Any] | None = None) -> None:
        self._enabled, self.about = enabled, dict(about or {})
        self._alone = threading.Lock()
        self._handler = _Warnings(self)

    def __enter__(self) -> Events:
        if self._enabled:
            logger.addHandler(self._handler)
        return self

    def __exit__(self, *_: object) -> None:
        logger.removeHandler(self._handler)

    def emit(self, event: str, **values: Any) -> None:
        """Writes one event with its values."""
        if not self._enabled:
            return
        line = json.dumps({"event": event, **self.about, **values}) + "\n"
        try:
            with self._alone:  # in one piece, as other processes write to the same stream
                sys.stdout.write(line)
                sys.stdout.flush()
        except (OSError, ValueError) as error:
            self._enabled = False
            silence_stdout()
            reason = error.strerror if isinstance(error, OSError) else "it is closed"
            logger.warning("stdout takes no more events (%s); the run goes on", reason)


def silence_stdout() -> None:
    """Discards the content of stdout's buffer, so that the end of the process does not fail on it."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, sys.stdout.fileno())
        finally:
            os.close(nowhere)


class _Warnings(logging.Handler):
    """Emits warnings and errors as events too."""

    def __init__(self, events: Events) -> None:
        super().__init__(logging.WARNING)
        self._events = events

    def emit(self, record: logging.LogRecord) -> None:
        kind = "warning" if record.levelno == logging.WARNING else "error"
        self._events.emit(kind, text=record.getMessage().removeprefix("error: "))


@dataclass
class Report:
    """The state of a run: events, images before it, images made so far, and the start time."""

    events: Events
    existing: int = 0
    saved: int = 0
    failed: int = 0
    elsewhere: bool = False  # in processes that report for themselves
    started: float = field(default_factory=time.monotonic)
