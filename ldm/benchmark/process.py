"""The process that a subject of a benchmark runs in."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from types import TracebackType
from typing import Any

from ldm.benchmark.subjects import Setting
from ldm.places import ROOT
from ldm.runtime.allocator import SWITCH
from ldm.util import InputError

# a peer's messages would be mixed with the figures
QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONWARNINGS": "ignore::FutureWarning",
}


class Process:
    """A worker process, queried over its standard streams."""

    def __init__(self, setting: Setting) -> None:
        environment = dict(os.environ)
        paths = [str(ROOT), *filter(None, [environment.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
        environment |= QUIET
        if (
            setting.malloc == "system" and environment.get(SWITCH) == "tuned"
        ):  # this tool's settings of the allocator
            del environment["GLIBC_TUNABLES"]
        if setting.threads:
            environment["OMP_NUM_THREADS"] = str(setting.threads)
        spawned = time.time()
        self._child = subprocess.Popen(
            [sys.executable, "-m", "ldm.benchmark.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self._send(asdict(replace(setting, spawned=spawned)))

    def _send(self, message: Mapping[str, Any]) -> None:
        assert self._child.stdin is not None
        self._child.stdin.write(json.dumps(message) + "\n")
        self._child.stdin.flush()

    def ask(self, order: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Sends an order and returns the answer; `fields` are the parameters of the worker's method of that name."""
        assert self._child.stdout is not None
        try:
            self._send({"order": order, **fields})
            line = self._child.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self._child.wait()
            raise ChildProcessError(f"the measured process ended with code {code} at {order!r}; see above")
        answer = json.loads(line)
        if "refused" in answer:
            raise InputError(answer["refused"])
        return answer

    def __enter__(self) -> Process:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Lets it end by itself, or stops it after an error."""
        if kind is not None:
            self._child.kill()
        for stream in (self._child.stdin, self._child.stdout):
            assert stream is not None
            with contextlib.suppress(OSError):
                stream.close()
        self._child.wait()
