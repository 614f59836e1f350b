"""A toolkit for Stable Diffusion v1: sampling, checkpoints, and images that can be recreated from their files.

`Job`, `Init`, `Pipeline` and `load_model` are imported when they are first used; `import ldm` alone is instant.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from ldm.former import install

if TYPE_CHECKING:
    from ldm.job import Init, Job
    from ldm.pipeline import Pipeline, load_model

__version__ = "0.1.0"
__all__ = ["Init", "Job", "Pipeline", "__version__", "load_model"]

_MODULES = {"Init": "ldm.job", "Job": "ldm.job", "Pipeline": "ldm.pipeline", "load_model": "ldm.pipeline"}


install()


def __getattr__(name: str) -> object:
    """Imports a public name at its first use (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
