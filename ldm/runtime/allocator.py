"""Memory for large activations without a page fault for every 4 kB. Imports nothing heavy."""

from __future__ import annotations

import os
import platform
import signal
import sys

SWITCH = "LDM_MALLOC"  # "system" leaves the allocator as it is
# Huge pages, and freed blocks kept for the next step instead of given back; either half alone gains little. Larger
# blocks, which only decoding needs, are given back: kept, they would lie between others and double its memory.
TUNABLES = {
    "glibc.malloc.hugetlb": 1,
    "glibc.malloc.mmap_threshold": 2**25,
    "glibc.malloc.trim_threshold": 2**34,
}
_OWN_CHOICES = (
    "GLIBC_TUNABLES",
    "LD_PRELOAD",
    "MALLOC_ARENA_MAX",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TRIM_THRESHOLD_",
)


def restart_tuned() -> None:
    """Starts this very command again with glibc's allocator set up for large tensors, which it reads at start only.

    Returns where that has happened already, where the environment chooses an allocator of its own, where
    `LDM_MALLOC` is set, and where there is no glibc. Call it before anything is done: the process stays, its
    memory does not.
    """
    chosen = [SWITCH, *_OWN_CHOICES]
    if (
        sys.platform != "linux"
        or platform.libc_ver()[0] != "glibc"
        or any(name in os.environ for name in chosen)
    ):
        return
    tunables = ":".join(f"{name}={value}" for name, value in TUNABLES.items())
    environment = {**os.environ, SWITCH: "tuned", "GLIBC_TUNABLES": tunables}
    # a Ctrl-C meanwhile waits for `allow_interrupts`: the new process could not say anything sensible about it
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
    except OSError:
        allow_interrupts()  # it only costs time


def allow_interrupts() -> None:
    """Ends what `restart_tuned` began: a Ctrl-C since then is a KeyboardInterrupt here."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
