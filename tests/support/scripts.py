"""Helpers of tests of the scripts."""

from __future__ import annotations

import signal

# one size for all runs in a process: weights are packed for the first, and others take longer with them
SMALL = ["--W", "64", "--H", "64"]
FAST = ["--ddim_steps", "2", "--n_iter", "1", "--n_samples", "1", "--device", "cpu", *SMALL, "--quiet"]


def interruptible() -> None:
    """In a child: Ctrl-C interrupts, also where these tests run in the background, which ignores it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
