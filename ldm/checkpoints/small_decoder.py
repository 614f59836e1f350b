"""The decoder of a TAESD file alone, without the model that it was made for."""

from __future__ import annotations

import os

from ldm.checkpoints.formats.detect import CheckpointError, reading
from ldm.checkpoints.layouts.names import keys_of_half, small_halves
from ldm.checkpoints.model_files import read_model
from ldm.modules.diffusionmodules.taesd import TAESDDecoder


def read_small_decoder(path: str | os.PathLike[str], channels: int) -> TAESDDecoder:
    """Returns the decoder of a file or folder in any layout of TAESD, for latents of so many channels.

    Faults are a `CheckpointError` of one line.
    """
    file = read_model(path)
    prefix, _ = keys_of_half("decoder")
    with reading(path):
        if "decoder" not in small_halves(file.state_dict):
            raise CheckpointError(f"has no decoder of a TAESD: it is {file.kind.name}")
        state = {key.removeprefix(prefix): t for key, t in file.state_dict.items() if key.startswith(prefix)}
        width, own = state["1.weight"].shape[:2]
        if own != channels:
            raise CheckpointError(f"decodes latents of {own} channels, and the model's have {channels}")
        decoder = TAESDDecoder(channels, width)
        decoder.load_state_dict(state)
    return decoder.eval().requires_grad_(False)
