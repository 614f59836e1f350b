"""Images as the image encoder of IP-Adapters sees them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.checkpoints.formats.read import read_checkpoint
from ldm.checkpoints.image_encoder import check_encoder, encoder_folder, encoder_weights
from ldm.checkpoints.load import load_into, skip_init
from ldm.checkpoints.model_files import read_json
from ldm.images.source import read_image

# mean and standard deviation of red, green and blue, of CLIP's preprocessing
_MEAN, _SPREAD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def prepared(pixels: np.ndarray, side: int) -> Tensor:
    """An image uint8 [H, W, 3] as CLIP reads it: its middle square, resampled, as float32 [1, 3, side, side].

    The shorter side becomes `side` (bicubic), then the middle is cut out, as CLIP's authors do.
    """
    image = Image.fromarray(pixels)
    shorter = min(image.size)
    width, height = (max(side, int(length * side / shorter)) for length in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - side) // 2, (height - side) // 2
    unit = np.asarray(image.crop((left, top, left + side, top + side)), np.float32) / 255
    values = (unit - np.array(_MEAN, np.float32)) / np.array(_SPREAD, np.float32)
    return torch.from_numpy(values).permute(2, 0, 1)[None].contiguous()


def load_encoder(folder: Path) -> Any:
    """CLIP's image encoder from a folder that transformers saved, in float32; nothing in its weights is run."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    settings: dict[str, Any] = dict(read_json(folder / "config.json"))
    with skip_init():
        encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(**settings))
    load_into(encoder, read_checkpoint(encoder_weights(folder)), torch.float32, ema="off", logs=False)
    return encoder.eval()


def see(file: Path, image: str, states: bool, width: int, device: torch.device) -> Tensor:
    """The input of an adapter in `file`, for no image and this one: embeddings [2, width], or states [2, M, width].

    No image is zeros: of the embedding, or with `states` of the encoder's input.
    """
    folder = encoder_folder(file)
    check_encoder(folder, states, width)
    encoder = load_encoder(folder).to(device)
    pixels = prepared(np.asarray(read_image(image).color), encoder.config.image_size).to(device)
    if states:
        seen = encoder(
            torch.cat([torch.zeros_like(pixels), pixels]), output_hidden_states=True
        ).hidden_states[-2]
    else:
        embedding = encoder(pixels).image_embeds
        seen = torch.cat([torch.zeros_like(embedding), embedding])
    return seen
