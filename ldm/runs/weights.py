"""The files of a run's weights, and their hashes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from ldm.runs.options import RunOptions
from ldm.util import InputError, printable


def weight_hashes(options: RunOptions, ckpt: Path) -> dict[str, Callable[[], str]]:
    """Returns the SHA-256 of the files of weights, computed in the background: large ones take seconds."""
    from ldm.checkpoints.hashing import files_sha256

    parts = weight_files(options, ckpt).items()
    return {f"{part} hash": _in_background(files_sha256, files) for part, files in parts}


def weight_files(options: RunOptions, ckpt: Path) -> dict[str, list[Path]]:
    """Returns the files of weights, by their names in the metadata."""
    files = files_of_model(options, ckpt)
    if options.upscaler is not None:
        files["Upscaler"] = [Path(options.upscaler)]
    return files


def files_of_model(options: RunOptions, ckpt: Path) -> dict[str, list[Path]]:
    """Returns the files that the model's own weights are in, by their names in the metadata."""
    from ldm.checkpoints.model_files import model_files

    files = {"Model": model_files(ckpt)}
    if options.vae is not None:
        files["VAE"] = model_files(options.vae, "vae")
    if options.text_encoder is not None:
        files["Text encoder"] = model_files(options.text_encoder, "text_encoder")
    return files


def weights_identity(options: RunOptions, ckpt: Path) -> object:
    """Returns a value that is equal as long as the files of weights are the same."""
    from ldm.checkpoints.cache import identity

    return identity([file for of_part in weight_files(options, ckpt).values() for file in of_part])


def _in_background(function: Callable[[list[Path]], str], paths: list[Path]) -> Callable[[], str]:
    """Starts `function(paths)` on a thread that never delays the end of the process; the call waits for it.

    The call raises errors of the thread; a file that cannot be read is an `InputError`.
    """
    results: list[str] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(function(paths))
        except BaseException as error:  # noqa: BLE001 - it is raised where the run can end in order
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()

    def result() -> str:
        thread.join()
        for error in errors:
            if isinstance(error, OSError):
                path = printable(error.filename or paths[0])
                raise InputError(f"{path} cannot be read: {error.strerror or printable(error)}") from error
            raise error
        return results[0]

    return result
