"""Where files are found: those that come with the toolkit, those that the user adds, and caches.

Names such as `models/ldm/shapes/model.ckpt` are relative to three folders, of which the first that has the file
counts: the current folder, the toolkit's own (the checkout, or the files installed with the package), and the
user's (`$XDG_DATA_HOME/ldm-v1`, usually `~/.local/share/ldm-v1`).
"""

from __future__ import annotations

import contextlib
import functools
import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # the checkout, or the folder that the package is installed in
_APP = "ldm-v1"


def find(path: str | Path) -> Path:
    """The first of the `candidates` of `path` that exists, be it a broken link; `path` as it is if none does."""
    return next((place for place in candidates(path) if os.path.lexists(place)), Path(path))


def candidates(path: str | Path) -> list[Path]:
    """Where the file or folder `path` is looked for, in order; an absolute path is only itself."""
    return list(dict.fromkeys(folder / path for folder in folders().values()))


def folders() -> dict[str, Path]:
    """The folders that relative names are looked up in, in order, by what they are called."""
    installed = _installed_files()
    own = {"checkout": ROOT} if installed is None else {"installed package": installed}
    found = {"current folder": Path(), **own}
    with contextlib.suppress(RuntimeError):  # a user without a home folder, as in some containers
        found["user folder"] = _user_folder("XDG_DATA_HOME", ".local/share")
    return found


@functools.cache
def _installed_files() -> Path | None:
    """The folder of the configs and the model that were installed with the package; None in a checkout."""
    from importlib.resources import files

    assets = Path(str(files("ldm") / "assets"))
    return assets if assets.is_dir() else None


def cache_path(name: str) -> Path:
    """Where the file or folder `name`, which can be made again, is kept between runs: in the user's cache."""
    return _user_folder("XDG_CACHE_HOME", ".cache") / name


def _user_folder(variable: str, usual: str) -> Path:
    """This toolkit's folder in the one that an environment variable names, or in `usual` of the home folder.

    A relative path in the variable is ignored, as the XDG base directory specification asks.
    """
    base = os.environ.get(variable, "")
    return (Path(base) if os.path.isabs(base) else Path.home() / usual) / _APP
