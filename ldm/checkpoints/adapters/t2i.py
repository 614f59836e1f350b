"""T2I-Adapter files: read under the authors' names or diffusers', and made into a network for a loaded U-Net."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from ldm.checkpoints.formats.detect import CheckpointError
from ldm.checkpoints.formats.read import Checkpoint
from ldm.checkpoints.load import load_into, skip_init
from ldm.modules.diffusionmodules.adapter import SHUFFLE, T2IAdapter
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.util import printable

_PREFIX = "adapter."
_PLACE = re.compile(r"body\.(\d{1,2})\.(?:resnets\.(\d{1,2})\.)?")


def adapter_weights(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of an adapter under its authors' names; diffusers groups the blocks of a level."""
    plain = {key.removeprefix(_PREFIX): tensor for key, tensor in state_dict.items()}
    numbers = [int(found[2]) for name in plain if (found := _PLACE.match(name)) and found[2]]
    if not numbers:
        return plain
    light, each = _is_light(plain), 1 + max(numbers)

    def ours(place: re.Match[str]) -> str:
        level, block = int(place[1]), place[2]
        if light:
            return f"body.{level}." + (f"body.{block}." if block else "")
        return f"body.{level * each + int(block or 0)}."

    return {_PLACE.sub(ours, name, count=1): tensor for name, tensor in plain.items()}


def adapter_network(checkpoint: Checkpoint, weights: Mapping[str, Tensor], unet: UNetModel) -> T2IAdapter:
    """The network of an adapter's weights, one map for each level of `unet`.

    `CheckpointError` where a weight is absent or has another shape.
    """
    light = _is_light(weights)
    widths = [unet.model_channels * mult for mult in unet.channel_mult]
    first = weights.get("body.0.in_conv.weight" if light else "conv_in.weight")
    if first is None or first.dim() != 4:
        raise CheckpointError(f"{printable(checkpoint.path)}: is a T2I-Adapter without its first convolution")
    if first.shape[1] not in (SHUFFLE**2, 3 * SHUFFLE**2):
        of_sdxl = first.shape[1] == 3 * (2 * SHUFFLE) ** 2  # whose cells have twice the side
        raise CheckpointError(
            f"{printable(checkpoint.path)}: is a T2I-Adapter {'for SDXL' if of_sdxl else 'of an unknown model'}, and "
            "this toolkit runs Stable Diffusion v1"
        )
    pattern = r"body\.0\.body\.(\d+)\.block1\.weight" if light else r"body\.(\d+)\.block1\.weight"
    blocks = sum(1 for name in weights if re.fullmatch(pattern, name))
    with skip_init():
        network = T2IAdapter(
            first.shape[1] // SHUFFLE**2, widths, blocks if light else max(blocks // len(widths), 1), light
        )
    load_into(network, checkpoint, logs=False)
    return network.eval()


def _is_light(weights: Mapping[str, Tensor]) -> bool:
    return any(".out_conv." in name for name in weights)
