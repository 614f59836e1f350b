"""What stays in memory from one test to the next: models, and the pace of this machine."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import ldm.pipeline
from ldm.checkpoints.configs import BUNDLED_CKPT
from ldm.checkpoints.formats.read import Checkpoint
from ldm.checkpoints.model_files import read_model
from ldm.modules.encoders import bert
from ldm.pipeline import Pipeline
from ldm.runtime.estimate import measure_pace
from tests.support.paths import ROOT


class SharedModels:
    """Replaces the `ModelCache` of a run: keeps the models of the last runs of all tests.

    A test that replaces the loader of models or the vocabulary does not share models with other tests.
    """

    def __init__(self, count: int = 3) -> None:
        self._count = count
        self._kept: list[tuple[object, Pipeline]] = []

    def get(self, key: object, load: Callable[[], Pipeline]) -> Pipeline:
        """Returns the pipeline of an earlier run with an equal key, else a new one."""
        key = key, ldm.pipeline.load_model, ldm.pipeline.Pipeline, bert.OWN_VOCABULARY
        entry = next((entry for entry in self._kept if entry[0] == key), None)
        if entry is None:
            entry = key, load()
        else:
            self._kept.remove(entry)
        self._kept = [entry, *self._kept[: self._count - 1]]
        return entry[1]


SHARED_MODELS = SharedModels()
shared_pace = cache(measure_pace)


def shared_reading(path: Any, *args: Any, **options: Any) -> Checkpoint:
    """Replaces the `read_model` of a command: reads the bundled checkpoint once, if nothing else is asked for."""
    if args or {*options.values()} - {None, "auto"} or Path(path) != ROOT / BUNDLED_CKPT:
        return read_model(path, *args, **options)
    return _bundled()


@cache
def _bundled() -> Checkpoint:
    return read_model(ROOT / BUNDLED_CKPT)
