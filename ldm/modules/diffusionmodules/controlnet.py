"""ControlNet: a second encoder of the U-Net that reads a hint image (Zhang et al. 2023, arXiv 2302.05543)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ldm.modules.diffusionmodules.openaimodel import TimestepEmbedSequential, UNetEncoder
from ldm.modules.diffusionmodules.util import conv_nd, zero_module

# the widths between the hint's channels and the latent's, and the steps of their convolutions: 8 in all
HINT_WIDTHS = ((16, 1), (16, 1), (32, 2), (32, 1), (96, 2), (96, 1), (256, 2))


class ControlNet(UNetEncoder):
    """Reads a hint image, and gives what is added to the maps of a U-Net: one for each block on the way down.

    The network is the U-Net's own encoder with parameters of its own; `hint_channels` is 3 for RGB. The other
    parameters are those of `UNetModel`, of which `out_channels` has no use.
    """

    def __init__(self, *args: Any, hint_channels: int = 3, out_channels: int = 4, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.hint_channels = hint_channels
        layers: list[nn.Module] = []
        width = hint_channels
        for out, stride in HINT_WIDTHS:
            layers += [conv_nd(self.dims, width, out, 3, padding=1, stride=stride), nn.SiLU()]
            width = out
        last = zero_module(conv_nd(self.dims, width, self.model_channels, 3, padding=1))
        self.input_hint_block = TimestepEmbedSequential(*layers, last)
        self.zero_convs = nn.ModuleList(self._zero_conv(width) for width in self.skip_widths)
        self.middle_block_out = self._zero_conv(self.skip_widths[-1])

    def _zero_conv(self, width: int) -> TimestepEmbedSequential:
        return TimestepEmbedSequential(zero_module(conv_nd(self.dims, width, width, 1)))

    def forward(
        self, x: Tensor, hint: Tensor, timesteps: Tensor, context: Tensor | None = None
    ) -> list[Tensor]:
        """Latents x [N, C, h, w], hint [N or 1, 3, 8h, 8w] in [0, 1], timesteps [N] -> one map for each block.

        The last is the middle block's; `UNetModel.forward` takes them as `control`.
        """
        return self.add(x, self.read_hint(hint), timesteps, context)

    def read_hint(self, hint: Tensor) -> Tensor:
        """The features [N, model_channels, h, w] of a hint, which are the same at every step."""
        h = hint.to(self.dtype)
        for layer in self.input_hint_block:
            h = layer(h)
        return h

    def add(self, x: Tensor, features: Tensor, timesteps: Tensor, context: Tensor | None) -> list[Tensor]:
        """`forward`, for a hint whose features were read before."""
        context = None if context is None else context.to(self.dtype)
        emb = self.embed_time(timesteps)
        maps = self.encode(x, emb, context, {0: features})
        for i, conv in enumerate([*self.zero_convs, self.middle_block_out]):
            maps[i] = conv(maps[i], emb)  # in place of a second list, which would take as much memory
        return maps
