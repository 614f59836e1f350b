"""Where files are found: those of the toolkit, those that the user adds, and caches.

Names such as `models/ldm/shapes/model.ckpt` are relative to three folders, of which the first that has the file is
used: the current folder, the toolkit's (the checkout, or the files installed with the package), and the user's
(`$XDG_DATA_HOME/ldm-v1`, usually `~/.local/share/ldm-v1`).
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # the checkout, or the folder that the package is installed in
_APP = "ldm-v1"


def find(path: str | Path) -> Path:
    """Returns the first of the `candidates` of `path` that exists, even as a broken link; else `path` unchanged."""
    return next((place for place in candidates(path) if os.path.lexists(place)), Path(path))


def candidates(path: str | Path) -> list[Path]:
    """Returns the paths where `path` is looked for, in order; an absolute path only as itself."""
    return list(dict.fromkeys(folder / path for folder in folders().values()))


def folders() -> dict[str, Path]:
    """Returns the folders that relative names are looked up in, in order, by their descriptions."""
    installed = _installed_files()
    own = {"checkout": ROOT} if installed is None else {"installed package": installed}
    found = {"current folder": Path(), **own}
    with contextlib.suppress(RuntimeError):  # a user without a home folder, as in some containers
        found["user folder"] = _user_folder("XDG_DATA_HOME", ".local/share")
    return found


def is_checkout() -> bool:
    """Returns whether the package is that of a checkout, with its scripts in the same folder."""
    return _installed_files() is None


@functools.cache
def _installed_files() -> Path | None:
    """Returns the folder of the configs and the model installed with the package; None in a checkout."""
    from importlib.resources import files

    assets = Path(str(files("ldm") / "assets"))
    return assets if assets.is_dir() else None


def hub_files(repositories: Sequence[str], names: Sequence[str]) -> Iterator[Path]:
    """Finds downloaded files, called by one of `names`, of repositories such as "CompVis/stable-diffusion-v1-4".

    They are looked up in the cache of Hugging Face's library, where HF_HOME or HF_HUB_CACHE may put it: first the
    revision that "main" was at the last download, then any other. Nothing is downloaded.
    """
    for repository in repositories:
        folder = hub_folder(repository)
        revision = _short_text(folder / "refs" / "main")
        snapshots = sorted((folder / "snapshots").glob("*/"), key=lambda path: (path.name != revision, path))
        for snapshot in snapshots:
            yield from (snapshot / name for name in names if os.path.isfile(snapshot / name))


def hub_folder(repository: str) -> Path:
    """Returns the folder of a Hugging Face repository in the cache of its library; it need not exist."""
    home = os.environ.get("HF_HOME") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface"
    )
    hub = (
        os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or os.path.join(home, "hub")
    )
    return Path(os.path.expanduser(hub), "models--" + repository.replace("/", "--"))


def _short_text(path: Path) -> str:
    """Reads the start of a small text file; empty if it cannot be read."""
    if not os.path.isfile(path):
        return ""
    with contextlib.suppress(OSError, UnicodeError), path.open(encoding="utf-8") as file:
        return file.read(100).strip()
    return ""


def cache_path(name: str) -> Path:
    """Returns the path in the user's cache of the file or folder `name`, which can be regenerated."""
    return _user_folder("XDG_CACHE_HOME", ".cache") / name


def _user_folder(variable: str, usual: str) -> Path:
    """Returns this toolkit's folder in the one that an environment variable names, or in `usual` of the home folder.

    A relative path in the variable is ignored, as the XDG base directory specification asks.
    """
    base = os.environ.get(variable, "")
    return (Path(base) if os.path.isabs(base) else Path.home() / usual) / _APP
