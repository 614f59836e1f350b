"""T2I-Adapter: maps that are added to those of the U-Net, made of a hint once an image (Mou et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

SHUFFLE = 8  # pixels of the hint a side that are the channels of one of its cells


class AdapterBlock(nn.Module):
    """Two convolutions around a residual connection, after one that changes the width where it has to."""

    def __init__(self, channels: int, out_channels: int, kernel: int):
        super().__init__()
        self.in_conv = nn.Conv2d(channels, out_channels, 1) if channels != out_channels else nn.Identity()
        self.block1 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.block2 = nn.Conv2d(out_channels, out_channels, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.in_conv(x)
        return x + self.block2(F.relu(self.block1(x)))


class LightLevel(nn.Module):
    """A level of the light adapter: its blocks work at a quarter of its width."""

    def __init__(self, channels: int, inner: int, out_channels: int, blocks: int):
        super().__init__()
        self.in_conv = nn.Conv2d(channels, inner, 1)
        self.body = nn.Sequential(*(AdapterBlock(inner, inner, 3) for _ in range(blocks)))
        self.out_conv = nn.Conv2d(inner, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_conv(self.body(self.in_conv(x)))


class T2IAdapter(nn.Module):
    """Reads a hint [N, hint_channels, H, W] from 0 to 1: one map for each level of the U-Net, of its width and size.

    Its parameters are called as in the authors' files. `blocks` are those of each level; a `light` one has fewer
    weights.
    """

    def __init__(self, hint_channels: int, widths: Sequence[int], blocks: int = 2, light: bool = False):
        super().__init__()
        self.hint_channels, self.blocks, self.light = hint_channels, blocks, light
        channels = hint_channels * SHUFFLE**2
        self.body = nn.ModuleList()
        if not light:
            self.conv_in = nn.Conv2d(channels, widths[0], 3, padding=1)
            channels = widths[0]
        for width in widths:
            if light:
                self.body.append(LightLevel(channels, width // 4, width, blocks))
            else:
                for i in range(blocks):
                    self.body.append(AdapterBlock(width if i else channels, width, 1))
            channels = width

    def forward(self, hint: Tensor) -> list[Tensor]:
        x = F.pixel_unshuffle(hint, SHUFFLE)
        if not self.light:
            x = self.conv_in(x)
        each = 1 if self.light else self.blocks
        maps: list[Tensor] = []
        for i, block in enumerate(self.body):
            if i and i % each == 0:
                x = F.avg_pool2d(x, 2, ceil_mode=True)
            x = block(x)
            if (i + 1) % each == 0:
                maps.append(x)
        return maps
