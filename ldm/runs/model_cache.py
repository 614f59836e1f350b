"""The model of the last run, for a next one in the same process."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING

from ldm.runs.filters import make_screen

if TYPE_CHECKING:
    from ldm.checkpoints.formats.read import Checkpoint
    from ldm.pipeline import Pipeline


class ModelCache:
    """Keeps one pipeline and the key that identifies it; there is never a second one in memory.

    `screen` is `make_screen`, and keeps the last safety check. `opened` is the checkpoint that the plan has looked
    into, with the identity of its files: the load that follows takes it, and it is not kept longer.
    """

    def __init__(self) -> None:
        self.opened: tuple[object, Checkpoint] | None = None
        self.screen = lru_cache(maxsize=1)(make_screen)
        self._key: object = None
        self._pipeline: Pipeline | None = None

    def take_opened(self, identity: object) -> Checkpoint | None:
        """Returns the opened checkpoint, once, if its files are still these."""
        opened, self.opened = self.opened, None
        return opened[1] if opened is not None and opened[0] == identity else None

    def get(self, key: object, load: Callable[[], Pipeline]) -> Pipeline:
        """Returns the pipeline cached under an equal key, as its last run left it; else caches a new one."""
        if self._pipeline is None or self._key != key:
            self._pipeline = None
            gc.collect()  # a pipeline and its caches refer to each other
            self._pipeline, self._key = load(), key
        return self._pipeline
