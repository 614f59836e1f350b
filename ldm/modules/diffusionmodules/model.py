"""The encoder and decoder between images and latents."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.modules.attention import pixel_attention
from ldm.util import only_with, warn_of_ignored

CH_MULT = (1, 2, 4, 8)  # each level's width in units of `ch`, where a config gives none


def nonlinearity(x: Tensor) -> Tensor:
    """Applies SiLU: x * sigmoid(x)."""
    return F.silu(x)


def Normalize(in_channels: int, num_groups: int = 32) -> nn.GroupNorm:
    """Returns the autoencoder's norm: eps 1e-6, where the U-Net's has 1e-5."""
    return nn.GroupNorm(num_groups, in_channels, eps=1e-6)


class Upsample(nn.Module):
    """Doubles height and width (nearest neighbour), then convolves."""

    def __init__(self, in_channels: int, with_conv: bool):
        super().__init__()
        self.with_conv = with_conv
        self.conv = nn.Conv2d(in_channels, in_channels, 3, padding=1) if with_conv else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Downsample(nn.Module):
    """Halves height and width; the strided convolution pads on the right and at the bottom only."""

    def __init__(self, in_channels: int, with_conv: bool):
        super().__init__()
        self.with_conv = with_conv
        self.conv = nn.Conv2d(in_channels, in_channels, 3, stride=2) if with_conv else nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.with_conv else x)


class ResnetBlock(nn.Module):
    """Two convolutions with a residual connection. The original's time embedding `temb` is not used here."""

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int | None = None,
        conv_shortcut: bool = False,
        dropout: float = 0.0,
        temb_channels: int = 0,
        num_groups: int = 32,
    ):
        super().__init__()
        only_with("ResnetBlock", conv_shortcut=(conv_shortcut, False), temb_channels=(temb_channels, 0))
        out_channels = out_channels or in_channels
        self.in_channels, self.out_channels = in_channels, out_channels
        self.use_conv_shortcut = conv_shortcut
        self.norm1 = Normalize(in_channels, num_groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = Normalize(out_channels, num_groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if out_channels != in_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)
        else:
            self.nin_shortcut = nn.Identity()

    def forward(self, x: Tensor, temb: None = None) -> Tensor:
        h = self.conv1(nonlinearity(self.norm1(x)))
        h = self.conv2(self.dropout(nonlinearity(self.norm2(h))))
        return self.nin_shortcut(x) + h


class AttnBlock(nn.Module):
    """Single-head self-attention between pixels, residual."""

    def __init__(self, in_channels: int, num_groups: int = 32):
        super().__init__()
        self.in_channels = in_channels
        self.norm = Normalize(in_channels, num_groups)
        self.q = nn.Conv2d(in_channels, in_channels, 1)
        self.k = nn.Conv2d(in_channels, in_channels, 1)
        self.v = nn.Conv2d(in_channels, in_channels, 1)
        self.proj_out = nn.Conv2d(in_channels, in_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.proj_out(pixel_attention(self.q(h), self.k(h), self.v(h)))


class Middle(nn.Module):
    """The lowest level: block, attention, block."""

    def __init__(self, channels: int, dropout: float, num_groups: int):
        super().__init__()
        self.block_1 = ResnetBlock(in_channels=channels, dropout=dropout, num_groups=num_groups)
        self.attn_1 = AttnBlock(channels, num_groups)
        self.block_2 = ResnetBlock(in_channels=channels, dropout=dropout, num_groups=num_groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Level(nn.Module):
    """One resolution: residual blocks, each followed by attention where the level has any."""

    def __init__(self, channels: Sequence[int], attention: bool, dropout: float, num_groups: int):
        super().__init__()
        pairs = list(pairwise(channels))
        self.block = nn.ModuleList(
            ResnetBlock(in_channels=a, out_channels=b, dropout=dropout, num_groups=num_groups)
            for a, b in pairs
        )
        self.attn = nn.ModuleList(AttnBlock(b, num_groups) for _, b in pairs if attention)

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        return x


class DownLevel(Level):
    """A level of the encoder; all but the last halve the size after it."""

    def __init__(
        self,
        channels: Sequence[int],
        attention: bool,
        dropout: float,
        num_groups: int,
        shrink: bool,
        conv: bool,
    ):
        super().__init__(channels, attention, dropout, num_groups)
        self.downsample = Downsample(channels[-1], conv) if shrink else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.downsample(super().forward(x))


class UpLevel(Level):
    """A level of the decoder; all but the last double the size after it."""

    def __init__(
        self,
        channels: Sequence[int],
        attention: bool,
        dropout: float,
        num_groups: int,
        grow: bool,
        conv: bool,
    ):
        super().__init__(channels, attention, dropout, num_groups)
        self.upsample = Upsample(channels[-1], conv) if grow else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.upsample(super().forward(x))


class Encoder(nn.Module):
    """Images [B, in_channels, H, W] in [-1, 1] -> features [B, 2 * z_channels, H/f, W/f], f = 2^(levels - 1).

    `ddconfig` of the published configs describes encoder and decoder at once: `out_ch` is the decoder's.
    `num_groups` is that of every group norm; with one channel a group, a norm removes the mean colour. A warning
    names any other entries of `ddconfig`.
    """

    temb_ch = 0  # the original's width of a time embedding, which no autoencoder has

    def __init__(
        self,
        *,
        ch: int,
        out_ch: int,
        num_res_blocks: int,
        attn_resolutions: Sequence[int],
        in_channels: int,
        resolution: int,
        z_channels: int,
        ch_mult: Sequence[int] = CH_MULT,
        dropout: float = 0.0,
        resamp_with_conv: bool = True,
        double_z: bool = True,
        num_groups: int = 32,
        use_linear_attn: bool = False,
        attn_type: str = "vanilla",
        give_pre_end: bool = False,
        tanh_out: bool = False,
        **ignore_kwargs: Any,
    ):
        super().__init__()
        only_with("Encoder", use_linear_attn=(use_linear_attn, False), attn_type=(attn_type, "vanilla"))
        warn_of_ignored("the autoencoder", ignore_kwargs)
        self.ch, self.num_resolutions, self.num_res_blocks = ch, len(ch_mult), num_res_blocks
        self.resolution, self.in_channels = resolution, in_channels
        widths = [ch * mult for mult in ch_mult]
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)
        self.down = nn.ModuleList(
            DownLevel(
                [entering, *[width] * num_res_blocks],
                attention=resolution // 2**i in attn_resolutions,
                dropout=dropout,
                num_groups=num_groups,
                shrink=i < len(widths) - 1,
                conv=resamp_with_conv,
            )
            for i, (entering, width) in enumerate(zip([ch, *widths], widths, strict=False))
        )
        self.mid = Middle(widths[-1], dropout, num_groups)
        self.norm_out = Normalize(widths[-1], num_groups)
        self.conv_out = nn.Conv2d(widths[-1], 2 * z_channels if double_z else z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        return self.conv_out(nonlinearity(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """Latents [B, z_channels, h, w] -> images [B, out_ch, f * h, f * w], approximately in [-1, 1].

    `up` is stored from the finest level to the coarsest and run the other way round, as published
    checkpoints have it. `in_channels` and `double_z` of the shared `ddconfig` are the encoder's. With
    `give_pre_end` the features before the last norm are the result, with `tanh_out` it ends in a tanh.
    """

    temb_ch = 0

    def __init__(
        self,
        *,
        ch: int,
        out_ch: int,
        num_res_blocks: int,
        attn_resolutions: Sequence[int],
        in_channels: int,
        resolution: int,
        z_channels: int,
        ch_mult: Sequence[int] = CH_MULT,
        dropout: float = 0.0,
        resamp_with_conv: bool = True,
        double_z: bool = True,
        num_groups: int = 32,
        use_linear_attn: bool = False,
        attn_type: str = "vanilla",
        give_pre_end: bool = False,
        tanh_out: bool = False,
        **ignore_kwargs: Any,
    ):
        super().__init__()
        only_with("Decoder", use_linear_attn=(use_linear_attn, False), attn_type=(attn_type, "vanilla"))
        self.ch, self.num_resolutions, self.num_res_blocks = ch, len(ch_mult), num_res_blocks
        self.resolution, self.in_channels = resolution, in_channels
        self.give_pre_end, self.tanh_out = give_pre_end, tanh_out
        widths = [ch * mult for mult in ch_mult]
        self.conv_in = nn.Conv2d(z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], dropout, num_groups)
        self.up = nn.ModuleList(
            UpLevel(
                [entering, *[width] * (num_res_blocks + 1)],
                attention=resolution // 2**i in attn_resolutions,
                dropout=dropout,
                num_groups=num_groups,
                grow=i > 0,
                conv=resamp_with_conv,
            )
            for i, (entering, width) in enumerate(zip([*widths[1:], widths[-1]], widths, strict=True))
        )
        self.norm_out = Normalize(widths[0], num_groups)
        self.conv_out = nn.Conv2d(widths[0], out_ch, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        if self.give_pre_end:
            return h
        h = self.conv_out(nonlinearity(self.norm_out(h)))
        return torch.tanh(h) if self.tanh_out else h
