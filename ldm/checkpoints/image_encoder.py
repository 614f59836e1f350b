"""Where the image encoder of IP-Adapters is."""

from __future__ import annotations

from pathlib import Path

from ldm.checkpoints.model_files import read_json
from ldm.places import find
from ldm.util import InputError, printable

_FOLDER, _WEIGHTS = "image_encoder", ("model.safetensors", "pytorch_model.bin")


def encoder_folder(adapter: Path) -> Path:
    """The folder of CLIP's image encoder: `image_encoder` next to an adapter's file, or in `models`.

    `InputError` where there is none with a config and weights.
    """
    folders = [adapter.parent / _FOLDER, find(f"models/{_FOLDER}")]
    for folder in folders:
        if (folder / "config.json").is_file() and any((folder / name).is_file() for name in _WEIGHTS):
            return folder
    raise InputError(
        f"the IP-Adapter {printable(adapter)} needs CLIP's image encoder: put the folder {_FOLDER} of h94/IP-Adapter "
        f"(config.json and model.safetensors) next to it, or into models"
    )


def check_encoder(folder: Path, states: bool, width: int) -> None:
    """Raises `InputError` where an image encoder has another width than an IP-Adapter reads.

    It is that of the embedding, or with `states` of the layers, by its config, with the defaults of transformers.
    """
    name, usual = ("hidden_size", 768) if states else ("projection_dim", 512)
    own = read_json(folder / "config.json").get(name, usual)
    if own != width:
        raise InputError(
            f"{printable(folder)} is an image encoder of {printable(own)} numbers, and the IP-Adapter reads {width}; "
            "give the one that it was trained with (CLIP ViT-H/14)"
        )


def encoder_hash(control: Path) -> str:
    """The SHA-256 of the image encoder that a file for `--control` needs; empty for one that is not an IP-Adapter."""
    from ldm.checkpoints.adapters.control import read_control
    from ldm.checkpoints.hashing import file_sha256

    needs = read_control(control).is_image_prompt
    return file_sha256(encoder_weights(encoder_folder(control))) if needs else ""


def encoder_weights(folder: Path) -> Path:
    """The weights in a folder that `encoder_folder` found."""
    return next(folder / name for name in _WEIGHTS if (folder / name).is_file())
