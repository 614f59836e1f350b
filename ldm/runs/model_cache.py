"""The model of the last run, for a next one in the same process."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ldm.pipeline import Pipeline


class ModelCache:
    """Keeps one pipeline with what tells it from others; there is never a second one in memory."""

    def __init__(self) -> None:
        self._key: object = None
        self._pipeline: Pipeline | None = None

    def get(self, key: object, load: Callable[[], Pipeline]) -> Pipeline:
        """The pipeline that was kept under an equal key, as its last run left it; else a new one, which is kept."""
        if self._pipeline is None or self._key != key:
            self._pipeline = None
            gc.collect()  # a pipeline and its caches hold each other
            self._pipeline, self._key = load(), key
        return self._pipeline
