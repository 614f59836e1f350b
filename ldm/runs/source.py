"""The sources of the images of a run, besides its jobs: config, weights, device and files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.job import Init
from ldm.runs.model_cache import ModelCache
from ldm.runs.processes import ProcessInfo

if TYPE_CHECKING:
    from ldm.checkpoints.adapters.lora_files import LoraFiles
    from ldm.images.canvas import Canvas
    from ldm.runtime.device import Precision


@dataclass(frozen=True)
class Source:
    """The model, files and settings that a run's images depend on, besides its jobs."""

    config_path: Path
    config: Mapping[str, Any]
    ckpt: Path
    here: ProcessInfo
    precision: Precision
    canvases: Callable[[Init], Canvas]
    find_lora: LoraFiles
    cache: ModelCache
