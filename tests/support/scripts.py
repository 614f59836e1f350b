"""Helpers of tests of the scripts."""

from __future__ import annotations

import signal

FAST = ["--ddim_steps", "2", "--n_iter", "1", "--n_samples", "1", "--device", "cpu", "--quiet"]


def interruptible() -> None:
    """In a child: Ctrl-C interrupts, also where these tests run in the background, which ignores it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
