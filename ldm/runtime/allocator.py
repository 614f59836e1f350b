"""Memory for large activations without a page fault for every 4 kB. Imports nothing heavy."""

from __future__ import annotations

import os
import platform
import signal
import sys

SWITCH = "LDM_MALLOC"  # "system" keeps the default allocator
# Huge pages, and freed blocks kept for the next step instead of returned; either half alone gains little. Larger
# blocks, which only decoding needs, are returned: kept, they would fragment the memory and double it.
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
    """Restarts this command with glibc's allocator tuned for large tensors, which it reads only at process start.

    Returns if that has happened already, if the environment selects another allocator, if `LDM_MALLOC` is set, and
    without glibc. Call it before anything else: the process keeps its id, but loses its memory.
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
    # a Ctrl-C meanwhile waits for `allow_interrupts`: the new process could not report it properly
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
    except OSError:
        allow_interrupts()  # a failure only costs time


def return_freed() -> None:
    """Returns the memory of freed blocks, which `restart_tuned` has the allocator keep, to the system."""
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        import ctypes

        ctypes.CDLL(None).malloc_trim(0)


def allow_interrupts() -> None:
    """Unblocks Ctrl-C after `restart_tuned`: one since then raises KeyboardInterrupt here."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
