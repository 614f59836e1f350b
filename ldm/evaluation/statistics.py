"""Statistics of reference images as .npz files, in the forms that others publish.

pytorch-fid, clean-fid and ADM's evaluator all store `mu` [D] and `sigma` [D, D].
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from ldm.evaluation.distances import Gaussian
from ldm.files import guarded, open_regular, written_whole
from ldm.util import InputError


def write_statistics(path: Path, gaussian: Gaussian) -> None:
    """Writes mean and covariance as `mu` and `sigma`, and the number of images as `n`; replaces the file."""
    with written_whole(path, overwrite=True) as part, part.open("wb") as file:
        np.savez(file, mu=gaussian.mean, sigma=gaussian.covariance, n=gaussian.count)


def read_statistics(path: Path) -> Gaussian:
    """Reads `mu` and `sigma` of a .npz file. The number of images is 0 where the file lacks it.

    Raises InputError of one line for a damaged file or one of something else; nothing in it is run.
    """
    with guarded(path, _damage), open_regular(path) as file, np.load(file, allow_pickle=False) as data:
        if "mu" not in data or "sigma" not in data:
            raise InputError(
                f"holds {', '.join(data.files)[:80] or 'nothing'}, and not mu and sigma; give statistics of images, "
                "as `evaluate.py score --save_statistics` writes them, or a folder"
            )
        mean, covariance = np.asarray(data["mu"], np.float64), np.asarray(data["sigma"], np.float64)
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)) or not np.isfinite(covariance).all():
            raise InputError(
                f"mu is {list(mean.shape)} and sigma {list(covariance.shape)}: not statistics of features"
            )
        return Gaussian(int(data["n"]) if "n" in data else 0, mean, covariance)


def _damage(error: Exception) -> str:
    kind = "is not a .npz file" if isinstance(error, zipfile.BadZipFile | ValueError) else "is damaged"
    return f"{kind} ({type(error).__name__}: {error}); write or download it again"
