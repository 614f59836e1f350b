"""A thread that runs tasks in order, which may lag a few tasks."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


logger = logging.getLogger("ldm")
WAITING_BATCHES = 4  # finished batches that may wait for the disk before sampling waits too
LAST_WRITE_SECONDS = 5  # seconds that a run that is interrupted twice waits for the file being written


class Background:
    """Runs tasks in order on one thread, with a short queue; the first error ends it.

    The error is raised by the next `put` or `wait`, in the thread that calls it. The thread never delays the end of
    the process.
    """

    def __init__(self, size: int = WAITING_BATCHES) -> None:
        self._tasks: queue.Queue[Callable[[], object]] = queue.Queue(size)
        self._error: BaseException | None = None
        self._stopped = False
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def put(self, task: Callable[[], object]) -> None:
        """Queues `task`; waits while the queue is full."""
        self._raise()
        self._tasks.put(task)

    def offer(self, task: Callable[[], object]) -> None:
        """Queues `task`, or leaves it out while the queue is full."""
        with contextlib.suppress(queue.Full):
            self._tasks.put_nowait(task)

    def wait(self) -> None:
        """Returns when all tasks are done."""
        self._tasks.join()
        self._raise()

    def recover(self) -> None:
        """Returns when all tasks are done, and clears the error that ended the thread."""
        self._tasks.join()
        self._error = None

    def stop(self) -> None:
        """Drops the tasks that have not begun, and waits a few seconds for the current one."""
        self._stopped = True
        with contextlib.suppress(queue.Full):  # then the thread is busy, and will see the flag
            self._tasks.put_nowait(lambda: None)
        self._thread.join(LAST_WRITE_SECONDS)

    def _work(self) -> None:
        while not self._stopped:
            task = self._tasks.get()
            try:
                if self._error is None and not self._stopped:
                    task()
            except BaseException as error:  # noqa: BLE001 - it is raised where the run can end in order
                self._error = error
            finally:
                self._tasks.task_done()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error
