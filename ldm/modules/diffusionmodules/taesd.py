"""TAESD, a small autoencoder that was distilled from v1's (Ollin Boer Bohan, https://github.com/madebyollin/taesd).

It works on images in [0, 1] and on latents as diffusion has them: multiplied by v1's scale. The numbers of the layers
in a row are those of its published files.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

LEVELS = 3  # of halving the size
_BLOCKS = 3  # on each level
_MOST = 3.0  # greatest absolute value of a latent


class Block(nn.Module):
    """Three convolutions with a residual connection."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Sequential(
            _convolution(width, width),
            nn.ReLU(),
            _convolution(width, width),
            nn.ReLU(),
            _convolution(width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x) + x)


class SoftClamp(nn.Module):
    """Keeps latents within [-3, 3], smoothly."""

    def forward(self, z: Tensor) -> Tensor:
        return _MOST * (z / _MOST).tanh()


class TAESDEncoder(nn.Sequential):
    """Maps images [N, 3, H, W] in [0, 1] to latents [N, channels, H / 8, W / 8]."""

    def __init__(self, channels: int = 4, width: int = 64):
        layers = [_convolution(3, width), Block(width)]
        for _ in range(LEVELS):
            layers += [_convolution(width, width, stride=2, bias=False), *_blocks(width)]
        super().__init__(*layers, _convolution(width, channels))


class TAESDDecoder(nn.Sequential):
    """Maps latents [N, channels, h, w] to images [N, 3, 8 h, 8 w], approximately in [0, 1]."""

    def __init__(self, channels: int = 4, width: int = 64):
        layers: list[nn.Module] = [SoftClamp(), _convolution(channels, width), nn.ReLU()]
        for _ in range(LEVELS):
            layers += [*_blocks(width), nn.Upsample(scale_factor=2), _convolution(width, width, bias=False)]
        super().__init__(*layers, Block(width), _convolution(width, 3))


def _blocks(width: int) -> list[Block]:
    return [Block(width) for _ in range(_BLOCKS)]


def _convolution(entering: int, leaving: int, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(entering, leaving, 3, stride, padding=1, bias=bias)
