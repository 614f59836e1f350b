"""Modules and names of earlier commits, for code that imports them: each gives what its successors hold.

Importing one warns with a DeprecationWarning that names the successors. Nothing of this package imports them.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from importlib.abc import Loader

SUCCESSORS: dict[str, tuple[str, ...]] = {
    "ldm.images.foreign": ("ldm.metadata.read",),
    "ldm.images.metadata": ("ldm.metadata.infotext",),
    "ldm.images.record": ("ldm.metadata.record",),
    "ldm.images.safety": ("ldm.safety.screen",),
    "ldm.checkpoints.embeddings": ("ldm.checkpoints.adapters.embeddings",),
    "ldm.checkpoints.lora": ("ldm.checkpoints.adapters.lora",),
    "ldm.checkpoints.lora_files": ("ldm.checkpoints.adapters.lora_files",),
    "ldm.checkpoints.lora_names": ("ldm.checkpoints.adapters.lora_names",),
    "ldm.checkpoints.prediction": ("ldm.checkpoints.layouts.prediction",),
    "ldm.checkpoints.reader": ("ldm.checkpoints.model_files", "ldm.checkpoints.formats.read"),
    "ldm.checkpoints.recognise": ("ldm.checkpoints.layouts.recognise",),
    "ldm.checkpoints.safety": ("ldm.safety.load",),
    "ldm.checkpoints.sniff": ("ldm.checkpoints.formats.detect",),
    "ldm.metadata.foreign.comfyui_graph": ("ldm.metadata.foreign.comfyui.graph",),
    "ldm.metadata.foreign.comfyui_prompt": ("ldm.metadata.foreign.comfyui.prompt",),
    "ldm.pipeline.picture": ("ldm.pipeline.image", "ldm.pipeline"),
    "ldm.modules.encoders.safety": ("ldm.safety.network",),
}

MOVED: dict[str, tuple[str, tuple[str, ...]]] = {  # names that went from a module to another one
    "ldm.fields": (
        "ldm.job_values",
        ("check_fields", "override", "read_held", "values_of", "values_of_options"),
    ),
    "ldm.images.canvas": ("ldm.images.folders", ("find_images", "find_pairs")),
}


def moved(module: str, name: str) -> Any:
    """Returns what `name` of a module is now in another one, with a warning; AttributeError if nothing is."""
    successor, names = MOVED[module]
    if name not in names:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    warnings.warn(f"{module}.{name} is now {successor}.{name}", DeprecationWarning, stacklevel=3)
    return getattr(import_module(successor), name)


class FormerModules:
    """Finds modules by their former names; importlib.abc, whose classes it could have as bases, imports much."""

    def create_module(self, spec: ModuleSpec) -> None:
        """Returns None: a module of the usual class."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Returns a spec for a module that has moved, None for any other."""
        return ModuleSpec(fullname, cast("Loader", self)) if fullname in SUCCESSORS else None

    def exec_module(self, module: ModuleType) -> None:
        """Fills a module with what its successors hold, theirs under each of their names."""
        names = SUCCESSORS[module.__name__]
        warnings.warn(f"{module.__name__} is now {' and '.join(names)}", DeprecationWarning, stacklevel=2)
        for name in reversed(names):
            held = vars(import_module(name))
            vars(module).update({key: value for key, value in held.items() if not key.startswith("__")})


def install() -> None:
    """Lets the former names be imported; a module of that name that exists comes first."""
    if not any(isinstance(finder, FormerModules) for finder in sys.meta_path):
        sys.meta_path.append(FormerModules())
