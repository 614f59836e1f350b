"""Logging to stderr: above a progress bar, with the number of the process where several write."""

from __future__ import annotations

import contextlib
import io
import logging
import sys

logger = logging.getLogger("ldm")

REST = "to finish the rest, run the same command with --resume"
OF_EACH = 25  # the level of messages that each of several processes logs for itself


class _Lines(logging.Formatter):
    """Formats messages as plain text: warnings with their level, and with the process's number where several log."""

    def __init__(self, speaker: str = "") -> None:
        super().__init__("%(message)s")
        self._speaker = speaker

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return self._speaker + (f"warning: {text}" if record.levelno == logging.WARNING else text)


def name_process(rank: int, world: int, quiet: bool, debug: bool) -> None:
    """Prefixes this process's messages with its number, if it is one of several; only the first logs shared ones."""
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
                sys.stderr.write(text + "\n")
                sys.stderr.flush()


def set_up_messages(quiet: bool, debug: bool) -> None:
    """Logs to stderr: everything with `debug`, only warnings and errors with `quiet`."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    handler = _Stderr()
    handler.setFormatter(_Lines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    _set_level(quiet, debug)
