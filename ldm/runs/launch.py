"""Starts the processes of `--devices N` on this machine, and waits for them."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm.files import temporary_folder
from ldm.runs.messages import REST
from ldm.runs.options import RunOptions
from ldm.runs.processes import (
    MEETING,
    PARENT,
    TEMPORARY,
    asked_for,
    begun_file,
    is_one_of_several,
    started_by_another,
)
from ldm.util import need

logger = logging.getLogger("ldm")


def start(options: RunOptions, command: Sequence[str] | None, stdin_copy: str | None = None) -> int | None:
    """Starts the processes of this machine and waits for them; returns the exit code, or None in one of them.

    Each runs this Python with the arguments `command`, and reads the file `stdin_copy` as its standard input.
    """
    if not is_one_of_several(options) or started_by_another():
        return None
    devices, nodes = asked_for(options)
    if nodes > 1:
        for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK"):
            need(
                name in os.environ,
                f"--num_nodes {nodes} without torchrun or SLURM needs {name} in the environment of each machine",
            )
    need(command is not None, "--devices starts the script again, so it works from a command line only")
    with temporary_folder(TEMPORARY, Path(tempfile.gettempdir())) as folder:
        environment = {**os.environ, PARENT: str(os.getpid()), MEETING: str(folder)}
        environment |= {"WORLD_SIZE": str(devices * nodes), "NODE_RANK": os.environ.get("NODE_RANK", "0")}
        if nodes == 1 and sys.platform == "linux":
            environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
        whole, given = [sys.executable, *(command or ())], stdin_copy or os.devnull
        return _supervise(whole, environment, devices, given, begun_file(str(folder)))


def _supervise(
    command: Sequence[str], environment: Mapping[str, str], count: int, given: str, begun: Path
) -> int:
    """Runs `command` in `count` processes, forwards signals, and waits; returns the exit code for all of them.

    `given` is the file that they read as standard input. A failure before the file `begun` exists ends all of them; a
    later one does not affect the others.
    """
    processes: list[subprocess.Popen[bytes]] = []
    received: list[int] = []

    def hand_on(number: int, frame: object) -> None:
        received.append(number)
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    with _handling(hand_on):
        for local_rank in range(count):
            with open(given, "rb") as stdin:
                processes.append(
                    subprocess.Popen(
                        command,
                        stdin=stdin,
                        env={**environment, "LOCAL_RANK": str(local_rank)},
                        start_new_session=True,  # Ctrl-C arrives here, and is forwarded once to each of them
                    )
                )
        while any(process.poll() is None for process in processes):
            time.sleep(0.1)
            if any(process.poll() for process in processes) and not begun.exists():
                break
        codes = [code for process in processes if (code := process.poll()) is not None]
        for process in processes:  # the others would wait long for the one that is lost
            process.kill()
            process.wait()
    for code in codes:
        if code < 0 and not received:
            logger.error(
                "error: signal %d ended one of the %d processes; what is finished is kept", -code, count
            )
    if any(code not in (0, 2) for code in codes):
        logger.warning(REST)
    return _joint_code(codes, received)


def _joint_code(codes: Sequence[int], received: Sequence[int]) -> int:
    """Returns 0 if all is done, 2 if nothing was, 128 + n after a signal, else 1."""
    if received and any(codes):
        return 128 + received[0]
    return codes[0] if len(set(codes)) == 1 and codes[0] >= 0 else 1


@contextlib.contextmanager
def _handling(handler: Any) -> Generator[None]:
    names = ("SIGINT", "SIGTERM", "SIGHUP")
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    old = {n: signal.signal(n, handler) for n in numbers if signal.getsignal(n) is not signal.SIG_IGN}
    try:
        yield
    finally:
        for number, former in old.items():
            signal.signal(number, former)
