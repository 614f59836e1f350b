"""Runs of a script in separate processes that start at once, since all imports are already done."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.support.paths import ROOT
from tests.support.scripts import interruptible

PARENT = """
import json, os, sys
sys.path.insert(0, {root!r})
import scripts.txt2img as t
import ldm.pipeline, ldm.runs.output, ldm.runs.gallery, ldm.metadata.command, lightning_fabric
print("ready", flush=True)
for line in sys.stdin:
    order = json.loads(line)
    if "wait" in order:
        print(os.waitpid(order["wait"], 0)[1], flush=True)
        continue
    pid = os.fork()
    if pid == 0:
        os.environ.update(order["env"])
        os._exit(t.main(order["argv"]))
    print(pid, flush=True)
"""


class ForkServer:
    """A process that forks one for each run; all have one thread. Their output goes to the file `messages`."""

    def __init__(self, messages: Path) -> None:
        command = [sys.executable, "-c", PARENT.format(root=str(ROOT))]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with open(messages, "w") as stderr:
            self._parent = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=environment,
                preexec_fn=interruptible,
            )

    def __enter__(self) -> "ForkServer":
        """Waits until it can start runs at once."""
        assert self._parent.stdout is not None
        assert self._parent.stdout.readline() == "ready\n"
        return self

    def __exit__(self, *_: object) -> None:
        self._parent.kill()
        self._parent.communicate()

    def start(self, argv: list[str], **env: str) -> int:
        """Starts the script with these arguments; returns its process id."""
        return self._ask({"argv": argv, "env": env})

    def wait(self, pid: int) -> int:
        """Waits for a process and returns its wait status; until then its id is not reused."""
        return self._ask({"wait": pid})

    def _ask(self, order: dict[str, object]) -> int:
        assert self._parent.stdin is not None
        assert self._parent.stdout is not None
        print(json.dumps(order), file=self._parent.stdin, flush=True)
        return int(self._parent.stdout.readline())
