"""The frame of every command: parses options and turns every outcome into one line and an exit code.

0: all done. 1: some image failed, or a resource ran out. 2: bad input, nothing generated. 128 + n: ended by
signal n.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import io
import logging
import os
import select
import sys
import traceback
from collections.abc import Callable, Sequence

from ldm.runs.messages import set_up_messages
from ldm.runs.progress import Events, silence_stdout
from ldm.runtime.allocator import allow_interrupts, restart_tuned
from ldm.util import InputError, printable

logger = logging.getLogger("ldm")

# the names of packages in the registry, if they differ from the imported names
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


def main(
    parser: argparse.ArgumentParser, script: Callable[[argparse.Namespace], int], argv: Sequence[str] | None
) -> int:
    """Parses the options, runs the command and turns every outcome into one line and an exit code."""
    fill_closed_streams()
    try:
        allow_interrupts()
        opt = _parse(parser, argv)
        if argv is None:  # a fault of the command line: nothing has been imported or opened yet
            restart_tuned()
            opt.typed = sys.orig_argv[1:]
        set_up_messages(opt.quiet, opt.debug)
        with contextlib.suppress(
            AttributeError, ValueError, OSError, RuntimeError
        ):  # stderr may not be a real file
            faulthandler.enable()  # a checkpoint that shrinks while it is mapped would end the process silently
        return outcome(lambda: script(opt), opt.debug)
    except KeyboardInterrupt:  # before any work has begun
        return 130
    finally:
        _flush_stdout()


def fill_closed_streams() -> None:
    """Opens the null device in place of closed standard streams, whose numbers later files would get otherwise."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - open as long as the process


def _flush_stdout() -> bool:
    """Flushes stdout and returns whether that succeeded; the rest is discarded if the reader is gone."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        silence_stdout()
        return False
    return True


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the options; faults of a run's are also an event if a program reads stdout."""
    makes_images = parser.get_default("dry_run") is False
    if not makes_images or "--json" not in (sys.argv[1:] if argv is None else argv):
        return parser.parse_args(argv)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return parser.parse_args(argv)
    except SystemExit as left:
        if left.code == 2:
            events = Events(True)
            events.emit("error", text=printed.getvalue().strip().removeprefix("error: "))
            events.emit("done", saved=0, failed=0, seconds=0.0, code=2)
        raise
    finally:
        sys.stderr.write(printed.getvalue())


def _reader_left() -> bool:
    """Returns whether stdout is a pipe whose other end is closed."""
    try:
        pipe = select.poll()
        pipe.register(sys.stdout.fileno(), 0)
        return bool(pipe.poll(0))
    except (AttributeError, OSError, ValueError):  # Windows has no poll; stdout may not be a file
        return False


def outcome(task: Callable[[], int], debug: bool) -> int:
    """Returns the exit code of a task; any fault of it becomes one line."""
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
            silence_stdout()
            return code  # the reader of stdout has closed it
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
    """Explains to the user why an import failed."""
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
