"""Plots by matplotlib, an optional package: a new figure, and figures saved whole."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.files import written_whole
from ldm.util import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 100
# the same figure gives the same bytes: no date, no version
_UNDATED: dict[str, dict[str, Any]] = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}


def available() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def new_figure(width: float, height: float) -> Figure:
    """Returns a figure of this size in inches, of 100 pixels. Raises `InputError` if matplotlib is missing."""
    try:
        importlib.import_module("matplotlib.backends.backend_svg")  # both are needed
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("plots need matplotlib: pip install 'latent-diffusion-v1[evaluate]'") from None
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Figure, path: Path, formats: Sequence[str] = ("png",)) -> list[Path]:
    """Writes a figure as `path` with each of the formats as its ending, png or svg, over what is there."""
    paths = [path.with_name(f"{path.name}.{name}") for name in formats]
    for file, name in zip(paths, formats, strict=True):
        with written_whole(file, overwrite=True) as part:
            figure.savefig(part, format=name, dpi=DPI, metadata=_UNDATED[name])
    return paths
