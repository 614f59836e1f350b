"""The memory of a device: how much there is, and how much of it is free."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch


def available_memory(device: torch.device) -> int | None:
    """Returns how many bytes are available on `device`, or None if that is unknown."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return system_memory(Path("/")) if device.type == "cpu" else None


def total_memory(device: torch.device) -> int | None:
    """Returns the total bytes of `device`, or of the control group of this process; None if that is unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    if device.type != "cpu":
        return None
    try:
        whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
    return min([whole, *(limit for limit, _ in _groups(Path("/")))])


def peak_memory(device: torch.device) -> int:
    """Returns the most bytes that this process had at a time: on a GPU of its memory, else of the machine's."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else peak_resident()


def peak_resident() -> int:
    """Returns the peak of this process alone; that of `getrusage` can be that of the process which started it."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            line = next(line for line in file if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def system_memory(root: Path) -> int | None:
    """Returns the bytes available on Linux, or in the control group of this process if that is less."""
    free = _field(root / "proc/meminfo", "MemAvailable:")
    if free is None:
        return None
    return min([free * 1024, *_group_memory(root)])


def _group_memory(root: Path) -> Iterator[int]:
    """Yields the bytes left in each limited control group (v2) around this process; page cache counts as free."""
    for limit, folder in _groups(root):
        with suppress(OSError, ValueError):
            used = int((folder / "memory.current").read_text())
            yield max(limit - used + (_field(folder / "memory.stat", "inactive_file") or 0), 0)


def _groups(root: Path) -> Iterator[tuple[int, Path]]:
    """Yields the limit of each limited control group (v2) around this process, and its folder."""
    group = "/"
    with suppress(OSError):
        lines = (root / "proc/self/cgroup").read_text().splitlines()
        group = next((line[3:] for line in lines if line.startswith("0::")), group)
    mount = root / "sys/fs/cgroup"
    own = mount / group.lstrip("/")
    for folder in (own, *own.parents):
        with suppress(OSError, ValueError):  # a group without a limit has no number there, the root no file
            yield int((folder / "memory.max").read_text()), folder
        if folder == mount:
            return


def _field(path: Path, name: str) -> int | None:
    """Returns the number after `name` in a file of the kernel, if both exist."""
    with suppress(OSError):
        for line in path.read_text().splitlines():
            key, value = line.split()[:2]
            if key == name:
                return int(value)
    return None
