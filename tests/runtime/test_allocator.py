"""The command line restarts itself once with a tuned allocator, unless the user has chosen one."""

import os
import platform
import subprocess
import sys

import pytest

from ldm.places import ROOT
from ldm.runtime.allocator import SWITCH, TUNABLES

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
SCRIPT = """
import os, sys
sys.path.insert(0, {root!r})
from ldm.runtime.allocator import restart_tuned
print(os.getpid(), os.environ.get("GLIBC_TUNABLES", ""), sys.argv[1:], flush=True)
restart_tuned()
print("runs", flush=True)
"""


def lines(tmp_path, **environment):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT.format(root=str(ROOT)))
    clean = {name: value for name, value in os.environ.items() if name not in (SWITCH, "GLIBC_TUNABLES")}
    command = [sys.executable, "-B", str(path), "--prompt", "two words", "-x"]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env={**clean, **environment})
    return run.stdout.splitlines()


def test_one_restart_with_the_same_words(tmp_path):
    before, after, end = lines(tmp_path)
    assert before.split()[0] == after.split()[0]  # the same process
    assert all(f"{name}={value}" in after for name, value in TUNABLES.items())
    assert after.endswith("['--prompt', 'two words', '-x']")
    assert end == "runs"


@pytest.mark.parametrize("name", [SWITCH, "GLIBC_TUNABLES", "LD_PRELOAD", "MALLOC_ARENA_MAX"])
def test_who_chose_an_allocator_keeps_it(tmp_path, name):
    assert len(lines(tmp_path, **{name: ""})) == 2
