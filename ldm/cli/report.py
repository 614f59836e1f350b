"""What a run says: messages, progress, and one line and an exit code for every outcome.

0: all done. 1: some image failed, or a resource ran out. 2: bad input, nothing generated. 128 + n: ended by
signal n.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import io
import json
import logging
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ldm.runtime.allocator import allow_interrupts, restart_tuned
from ldm.util import InputError, printable

logger = logging.getLogger("ldm")

# what packages are called where they are installed from, if not as they are imported
_PACKAGES = {
    "PIL": "pillow",
    "clip": "openai-clip",
    "cv2": "opencv-python",
    "imwatermark": "invisible-watermark",
    "lightning_fabric": "pytorch-lightning",
    "pytorch_lightning": "pytorch-lightning",
    "yaml": "pyyaml",
}
_NO_MEMORY = ("can't allocate memory", "could not create a primitive")  # torch's allocator, oneDNN


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
        logger.warning("stopping after this batch; press Ctrl-C again to stop now")


OF_EACH = 25  # the level of what each of several processes has to say for itself
NEWS_SECONDS = 30  # between lines where no terminal shows a bar
EVENT_SECONDS = 1  # between events that count steps


class Progress:
    """A bar over all denoising steps on a terminal; elsewhere a line for each batch, and within long ones.

    All say the time left. For programs the steps are events too, at most one a second.
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
        """Counts steps that come on top of those that were expected."""
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
    """A time as people say it: 45 s, 12 min, 3 h 20 min."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


class Events:
    """What happens, for programs: one JSON object a line on stdout. A stdout that is gone never stops the run.

    Each event has what `about` says.
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
            with self._alone:  # in one piece, as other processes write to the same place
                sys.stdout.write(line)
                sys.stdout.flush()
        except (OSError, ValueError) as error:
            self._enabled = False
            _silence_stdout()
            reason = error.strerror if isinstance(error, OSError) else "it is closed"
            logger.warning("stdout takes no more events (%s); the run goes on", reason)


def _silence_stdout() -> None:
    """Sends what is still in stdout's buffer nowhere, so that the end of the process does not fail on it."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, sys.stdout.fileno())
        finally:
            os.close(nowhere)


class _Warnings(logging.Handler):
    """Tells warnings and errors as events too."""

    def __init__(self, events: Events) -> None:
        super().__init__(logging.WARNING)
        self._events = events

    def emit(self, record: logging.LogRecord) -> None:
        kind = "warning" if record.levelno == logging.WARNING else "error"
        self._events.emit(kind, text=record.getMessage().removeprefix("error: "))


class _Lines(logging.Formatter):
    """Plain text for what is going on, the level in front of warnings, and who speaks where several do."""

    def __init__(self, speaker: str = "") -> None:
        super().__init__("%(message)s")
        self._speaker = speaker

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return self._speaker + (f"warning: {text}" if record.levelno == logging.WARNING else text)


def name_process(rank: int, world: int, quiet: bool, debug: bool) -> None:
    """Puts its number in front of what one of several processes says; only the first says what all would say."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, _Stderr):
            handler.setFormatter(_Lines(f"process {rank} of {world}: "))
    _set_level(quiet, debug, OF_EACH if rank else logging.INFO)


def _set_level(quiet: bool, debug: bool, usual: int = logging.INFO) -> None:
    logger.setLevel(logging.DEBUG if debug else logging.WARNING if quiet else usual)


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
    handler.setFormatter(_Lines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    _set_level(quiet, debug)


def main(
    parser: argparse.ArgumentParser, script: Callable[[argparse.Namespace], int], argv: Sequence[str] | None
) -> int:
    """Parses, runs and turns every outcome into one line and an exit code."""
    fill_closed_streams()
    try:
        allow_interrupts()
        opt = _parse(parser, argv)
        if argv is None:  # the command line's own: nothing has been imported or opened yet
            restart_tuned()
            opt.typed = sys.orig_argv[1:]
        set_up_messages(opt.quiet, opt.debug)
        with contextlib.suppress(
            AttributeError, ValueError, OSError, RuntimeError
        ):  # stderr can be no real file
            faulthandler.enable()  # a checkpoint that shrinks while it is mapped ends the process without a word
        return outcome(lambda: script(opt), opt.debug)
    except KeyboardInterrupt:  # before anything has begun
        return 130
    finally:
        _flush_stdout()


def fill_closed_streams() -> None:
    """Puts the null device where standard streams are closed: else files that are opened later take their places."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - as long as the process


def _flush_stdout() -> bool:
    """Whether what was printed has left; where nobody reads it any more, the rest of it goes nowhere."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        _silence_stdout()
        return False
    return True


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The options; where a run's are wrong and it is a program that reads stdout, that is an event too."""
    makes_images = parser.get_default("dry_run") is False
    if not makes_images or "--json" not in (sys.argv[1:] if argv is None else argv):
        return parser.parse_args(argv)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return parser.parse_args(argv)
    except SystemExit as left:
        if left.code == 2:
            events = Events(True)
            events.emit("error", text=said.getvalue().strip().removeprefix("error: "))
            events.emit("done", saved=0, failed=0, seconds=0.0, code=2)
        raise
    finally:
        sys.stderr.write(said.getvalue())


def _reader_left() -> bool:
    """Whether stdout is a pipe whose other end is closed."""
    try:
        pipe = select.poll()
        pipe.register(sys.stdout.fileno(), 0)
        return bool(pipe.poll(0))
    except (AttributeError, OSError, ValueError):  # Windows has no poll; a stdout need not be a file
        return False


def outcome(task: Callable[[], int], debug: bool) -> int:
    """The exit code of a task; any fault of it becomes one line."""
    code = 0
    try:
        code = task()
        sys.stdout.flush()
        return code
    except InputError as error:
        return _fail(f"error: {error}", 2, debug)
    except ImportError as error:
        return _fail(f"error: {missing_package(error)}", 2, debug)
    except KeyboardInterrupt:
        return _fail("error: interrupted", 130, False)
    except MemoryError:
        return _fail("error: out of memory; use a smaller --n_samples, --W or --H", 1, debug)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _reader_left():
            _silence_stdout()
            return code  # whoever read stdout has seen enough
        where = f"{printable(error.filename)}: " if error.filename else ""
        return _fail(f"error: {where}{error.strerror or error}", 1, debug)
    except Exception as error:  # noqa: BLE001 - the one place where any fault becomes one line
        if type(error).__name__ == "OutOfMemoryError" or any(part in str(error) for part in _NO_MEMORY):
            line = " ".join(printable(error).split())[:200]
            return _fail(f"error: out of memory ({line}); use a smaller --n_samples, --W or --H", 1, debug)
        if "CUDA error" in str(error) or type(error).__name__ == "AcceleratorError":
            line = " ".join(printable(error).split())[:200]
            return _fail(f"error: the GPU failed ({line}); finished images are kept, start again", 1, debug)
        what = " ".join(printable(f"{type(error).__name__}: {error}").split())[:300]
        return _fail(f"error: {what}; this is a bug, run with --debug to see where", 1, debug)


def missing_package(error: ImportError) -> str:
    """What an import that fails means for the user."""
    name = (error.name or "").partition(".")[0]
    package = printable(_PACKAGES.get(name, name))
    if name in sys.stdlib_module_names:
        return f"this Python lacks its own module {package}: use a complete Python"
    if isinstance(error, ModuleNotFoundError) and name and name != "ldm":
        return f"the package {package} is not installed: activate your environment, or run: pip install -e ."
    reason = " ".join(printable(error).split())[:200]
    return f"a package cannot be loaded ({reason}): install it again, or all of them with: pip install -e ."


def _fail(line: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    logger.error("%s", line)
    return code
