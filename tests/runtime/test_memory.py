"""The memory of a machine, as Linux and its control groups give it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ldm.runtime.memory import available_memory, system_memory, total_memory


def kernel_files(root: Path, group: str = "/") -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text("MemTotal:  9000 kB\nMemFree:  10 kB\nMemAvailable:   4000 kB\n")
    (root / "proc/self/cgroup").write_text(f"4:memory:/old\n0::{group}\n")
    folder = root / "sys/fs/cgroup" / group.lstrip("/")
    folder.mkdir(parents=True)
    return folder


def test_available_memory_is_the_kernels_estimate(tmp_path: Path) -> None:
    kernel_files(tmp_path)
    assert system_memory(tmp_path) == 4000 * 1024


@pytest.mark.parametrize(
    ("limit", "expected"), [("max", 4096000), ("9000000", 4096000), ("3000000", 2200000)]
)
def test_a_control_groups_limit_counts_if_it_is_lower(tmp_path: Path, limit: str, expected: int) -> None:
    folder = kernel_files(tmp_path, "/user/run")
    (folder.parent / "memory.max").write_text(limit + "\n")  # the limit may be that of a group around ours
    (folder.parent / "memory.current").write_text("1000000\n")
    (folder.parent / "memory.stat").write_text("anon 800000\ninactive_file 200000\n")
    assert system_memory(tmp_path) == expected


def test_unknown_memory_is_none(tmp_path: Path) -> None:
    assert system_memory(tmp_path) is None
    assert available_memory(torch.device("meta")) is None
    assert total_memory(torch.device("meta")) is None


def test_the_whole_memory_is_at_least_what_is_available() -> None:
    whole, available = (ask(torch.device("cpu")) for ask in (total_memory, available_memory))
    assert whole is not None and available is not None
    assert 2**20 < available <= whole
