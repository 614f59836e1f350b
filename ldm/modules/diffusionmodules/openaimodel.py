"""The U-Net that predicts the noise in a latent (Dhariwal and Nichol 2021, with cross-attention to text)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.modules.attention import SpatialTransformer
from ldm.modules.diffusionmodules.pixel_attention import AttentionBlock as AttentionBlock
from ldm.modules.diffusionmodules.util import (
    checkpoint,
    conv_nd,
    guidance_embedding,
    linear,
    normalization,
    timestep_embedding,
    zero_module,
)
from ldm.util import InputError, only_with, warn_of_ignored
from ldm.util import exists as exists

th = torch  # extensions import it from here


class TimestepBlock(nn.Module):
    """A module whose `forward` also takes the timestep embedding."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        raise TypeError(f"{type(self).__name__} does not define forward(x, emb)")


class TimestepEmbedSequential(nn.Sequential, TimestepBlock):  # pyright: ignore[reportIncompatibleVariableOverride]
    """Runs its children in turn and passes to each its inputs: the time embedding, the context, the size."""

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        emb: Tensor,
        context: Tensor | None = None,
        output_size: Sequence[int] | None = None,
    ) -> Tensor:
        """`output_size` (height, width) is that of an upsampling child; twice its input by default."""
        for layer in self:
            if isinstance(layer, TimestepBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            elif isinstance(layer, Upsample):
                x = layer(x, output_size)
            else:
                x = layer(x)
        return x


class Upsample(nn.Module):
    """Doubles height and width (nearest neighbour), then smooths with a convolution unless `use_conv` is off."""

    def __init__(
        self, channels: int, use_conv: bool, dims: int = 2, out_channels: int | None = None, padding: int = 1
    ):
        super().__init__()
        self.channels, self.out_channels = channels, out_channels or channels
        self.use_conv, self.dims = use_conv, dims
        self.conv = (
            conv_nd(dims, channels, self.out_channels, 3, padding=padding) if use_conv else nn.Identity()
        )

    def forward(self, x: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        size = output_size or [2 * side for side in x.shape[2:]]
        return self.conv(F.interpolate(x, size=tuple(size), mode="nearest"))


class Downsample(nn.Module):
    """Halves height and width (odd sizes round up) with a strided convolution, or by averaging."""

    def __init__(
        self, channels: int, use_conv: bool, dims: int = 2, out_channels: int | None = None, padding: int = 1
    ):
        super().__init__()
        self.channels, self.out_channels = channels, out_channels or channels
        self.use_conv, self.dims = use_conv, dims
        self.op = (
            conv_nd(dims, channels, self.out_channels, 3, stride=2, padding=padding)
            if use_conv
            else nn.AvgPool2d(2, ceil_mode=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class ResBlock(TimestepBlock):
    """Two convolutions with the time embedding added between them, around a residual connection."""

    def __init__(
        self,
        channels: int,
        emb_channels: int,
        dropout: float,
        out_channels: int | None = None,
        use_conv: bool = False,
        use_scale_shift_norm: bool = False,
        dims: int = 2,
        use_checkpoint: bool = False,
        up: bool = False,
        down: bool = False,
        num_groups: int = 32,
    ):
        super().__init__()
        only_with("ResBlock", up=(up, False), down=(down, False))
        out_channels = out_channels or channels
        self.channels, self.out_channels = channels, out_channels
        self.emb_channels, self.dropout, self.use_conv, self.updown = emb_channels, dropout, use_conv, False
        self.use_checkpoint, self.use_scale_shift_norm = use_checkpoint, use_scale_shift_norm
        self.in_layers = nn.Sequential(
            normalization(channels, num_groups),
            nn.SiLU(),
            conv_nd(dims, channels, out_channels, 3, padding=1),
        )
        emb_width = 2 * out_channels if use_scale_shift_norm else out_channels
        self.emb_layers = nn.Sequential(nn.SiLU(), linear(emb_channels, emb_width))
        self.out_layers = nn.Sequential(
            normalization(out_channels, num_groups),
            nn.SiLU(),
            nn.Dropout(dropout),
            zero_module(conv_nd(dims, out_channels, out_channels, 3, padding=1)),
        )
        if out_channels == channels:
            self.skip_connection = nn.Identity()
        else:
            kernel = 3 if use_conv else 1
            self.skip_connection = conv_nd(dims, channels, out_channels, kernel, padding=kernel // 2)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return checkpoint(self._forward, (x, emb), self.parameters(), self.use_checkpoint)

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers(x)
        emb = self.emb_layers(emb)
        emb = emb.reshape(*emb.shape, *[1] * (h.dim() - 2))
        if self.use_scale_shift_norm:
            scale, shift = emb.chunk(2, dim=1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + emb)
        return self.skip_connection(x) + h


class UNetEncoder(nn.Module):
    """The half of the U-Net on the way down, and its middle.

    `channel_mult` gives each level's width in units of `model_channels`; levels whose downsampling factor is
    in `attention_resolutions` get transformers with `num_heads` heads, or heads of `num_head_channels`.
    Every group norm has `num_groups` groups. Without `use_middle_block`, as in small models (Kim et al. 2024), the
    lowest map goes up as it is. With `time_cond_proj_dim` the guidance scale is an input, as features of that length
    (distilled models; Meng et al. 2023).
    `image_size`, `legacy`, `num_heads_upsample` and `use_new_attention_order` are part of published configs and
    change nothing here. A parameter that would need another network is an `InputError` that names it, except with
    the value that it has in v1 models.
    """

    def __init__(
        self,
        image_size: int,
        in_channels: int,
        model_channels: int,
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        dropout: float = 0.0,
        channel_mult: Sequence[int] = (1, 2, 4, 8),
        conv_resample: bool = True,
        dims: int = 2,
        num_classes: int | None = None,
        use_checkpoint: bool = False,
        use_fp16: bool = False,
        num_heads: int = -1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        use_spatial_transformer: bool = False,
        transformer_depth: int = 1,
        context_dim: int | None = None,
        n_embed: int | None = None,
        legacy: bool = True,
        num_groups: int = 32,
        disable_self_attentions: Sequence[bool] | None = None,
        disable_middle_self_attn: bool = False,
        num_attention_blocks: Sequence[int] | None = None,
        use_linear_in_transformer: bool = False,
        use_middle_block: bool = True,
        time_cond_proj_dim: int | None = None,
    ):
        given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        self.settings: dict[str, Any] = given  # with which another encoder of this shape can be built
        only_with(
            type(self).__name__,
            num_classes=(num_classes, None),
            use_fp16=(use_fp16, False),
            resblock_updown=(resblock_updown, False),
            n_embed=(n_embed, None),
            disable_self_attentions=(disable_self_attentions, None),
            disable_middle_self_attn=(disable_middle_self_attn, False),
            num_attention_blocks=(num_attention_blocks, None),
            use_linear_in_transformer=(use_linear_in_transformer, False),
        )
        if not use_spatial_transformer:
            raise ValueError(
                f"{type(self).__name__} needs use_spatial_transformer: true; attention without text is not built"
            )
        if (num_heads == -1) == (num_head_channels == -1):
            raise ValueError(f"{type(self).__name__} needs exactly one of num_heads and num_head_channels")
        self.image_size, self.legacy = image_size, legacy
        self.in_channels, self.model_channels = in_channels, model_channels
        self.num_res_blocks, self.channel_mult = num_res_blocks, channel_mult
        self.attention_resolutions, self.dropout, self.conv_resample = (
            attention_resolutions,
            dropout,
            conv_resample,
        )
        self.dims, self.num_groups = dims, num_groups
        self.num_heads, self.num_head_channels, self.use_checkpoint = (
            num_heads,
            num_head_channels,
            use_checkpoint,
        )
        self.num_heads_upsample = num_heads if num_heads_upsample == -1 else num_heads_upsample
        time_width = 4 * model_channels
        self._res_block = partial(
            ResBlock,
            emb_channels=time_width,
            dropout=dropout,
            dims=dims,
            use_checkpoint=use_checkpoint,
            use_scale_shift_norm=use_scale_shift_norm,
            num_groups=num_groups,
        )
        self.time_embed = nn.Sequential(
            linear(model_channels, time_width), nn.SiLU(), linear(time_width, time_width)
        )
        self.time_cond_proj_dim = time_cond_proj_dim
        if time_cond_proj_dim is not None:  # under the name that it has in all layouts
            projection = nn.Linear(time_cond_proj_dim, model_channels, bias=False)
            self.time_embedding = nn.ModuleDict({"cond_proj": projection})
        ch = model_channels
        self.input_blocks = nn.ModuleList(
            [TimestepEmbedSequential(conv_nd(dims, in_channels, ch, 3, padding=1))]
        )
        self.skip_widths = [ch]  # of the maps that the input blocks give
        for level, mult in enumerate(channel_mult):
            for _ in range(num_res_blocks):
                layers: list[nn.Module] = [self._res_block(ch, out_channels=mult * model_channels)]
                ch = mult * model_channels
                if 2**level in attention_resolutions:
                    layers.append(self._transformer(ch))
                self.input_blocks.append(TimestepEmbedSequential(*layers))
                self.skip_widths.append(ch)
            if level < len(channel_mult) - 1:
                self.input_blocks.append(TimestepEmbedSequential(Downsample(ch, conv_resample, dims=dims)))
                self.skip_widths.append(ch)
        self._feature_size = (
            sum(self.skip_widths) + ch
        )  # the widths of all blocks, as published models count them
        self.middle_block = TimestepEmbedSequential()
        if use_middle_block:
            self.middle_block.extend(
                [
                    self._res_block(ch, out_channels=ch),
                    self._transformer(ch),
                    self._res_block(ch, out_channels=ch),
                ]
            )

    def _transformer(self, ch: int) -> SpatialTransformer:
        heads = self.num_heads if self.num_head_channels == -1 else ch // self.num_head_channels
        names = ("context_dim", "use_checkpoint", "num_groups")
        options = {name: self.settings[name] for name in names}
        return SpatialTransformer(ch, heads, ch // heads, depth=self.settings["transformer_depth"], **options)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return next(self.input_blocks[1].parameters()).dtype

    def encode(
        self, x: Tensor, emb: Tensor, context: Tensor | None, added: Mapping[int, Tensor] | None = None
    ) -> list[Tensor]:
        """The map that each input block gives, and that of the middle block, for the time embedding `emb` [N, 4C].

        `added` are maps [N or 1, C, H, W] that are added to those of the blocks of these numbers.
        """
        h, added = x.to(self.dtype), added or {}
        maps: list[Tensor] = []
        for i, block in enumerate(self.input_blocks):
            h = block(h, emb, context)
            if i in added:
                h = h + added[i].to(h.dtype)
            maps.append(h)
        return [*maps, self.middle_block(h, emb, context)]

    def embed_time(self, timesteps: Tensor, guidance: Tensor | None = None) -> Tensor:
        """The time embedding [N, 4C] of timesteps [N], with guidance scales [N] where the network takes them."""
        features = timestep_embedding(timesteps, self.model_channels).to(self.dtype)
        if guidance is not None:
            if self.time_cond_proj_dim is None:
                raise InputError("this U-Net takes no guidance scale: it has no time_cond_proj_dim")
            weights = guidance_embedding(guidance - 1, self.time_cond_proj_dim).to(self.dtype)
            features = features + self.time_embedding["cond_proj"](weights)
        return self.time_embed(features)


class UNetModel(UNetEncoder):
    """Predicts noise: x [N, in_channels, H, W], timesteps [N], context [N, M, context_dim] -> like x.

    The parameters are those of `UNetEncoder`, and `out_channels`. H and W are any positive sizes: each upsampling
    grows to the size of its skip connection.
    """

    def __init__(
        self,
        image_size: int,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        *args: Any,
        **kwargs: Any,
    ):
        super().__init__(image_size, in_channels, model_channels, *args, **kwargs)
        self.out_channels = out_channels
        # for forward methods copied from the original: no classes, no codebook
        self.num_classes, self.predict_codebook_ids = None, False
        self._ignored: frozenset[str] = frozenset()  # keywords of forward that a warning has named
        skips = list(self.skip_widths)
        ch = skips[-1]
        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(self.channel_mult))):
            for i in range(self.num_res_blocks + 1):
                layers: list[nn.Module] = [
                    self._res_block(ch + skips.pop(), out_channels=mult * model_channels)
                ]
                ch = mult * model_channels
                self._feature_size += ch
                if 2**level in self.attention_resolutions:
                    layers.append(self._transformer(ch))
                if level > 0 and i == self.num_res_blocks:
                    layers.append(Upsample(ch, self.conv_resample, dims=self.dims))
                self.output_blocks.append(TimestepEmbedSequential(*layers))
        self.out = nn.Sequential(
            normalization(ch, self.num_groups),
            nn.SiLU(),
            zero_module(conv_nd(self.dims, ch, out_channels, 3, padding=1)),
        )

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor | None = None,
        y: None = None,
        guidance: Tensor | None = None,
        control: Sequence[Tensor] | None = None,
        features: Mapping[int, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """`guidance` [N] are guidance scales, for a model that has `time_cond_proj_dim`.

        `control` are maps, one for each input block and one for the middle block, that are added to theirs on the
        way up (Zhang et al. 2023, ControlNet, equation 4), `features` maps that are added on the way down, see
        `encode`. There are no classes, so `y` must be None; a warning names `kwargs`, which are ignored, once.
        """
        only_with("UNetModel.forward", y=(y, None))
        if kwargs and not self._ignored.issuperset(kwargs):
            self._ignored = self._ignored.union(kwargs)
            warn_of_ignored("UNetModel.forward", kwargs)
        emb = self.embed_time(timesteps, guidance)
        context = None if context is None else context.to(self.dtype)
        skips = self.encode(x, emb, context, features)
        if control is not None:
            for i, (h, added) in enumerate(zip(skips, control, strict=True)):
                skips[i] = self.with_control(h, added)  # one by one, so that memory holds few of them twice
        h = skips.pop()
        for block in list(self.output_blocks)[-len(skips) :]:
            h = self.with_skip(h, skips.pop())
            h = block(h, emb, context, output_size=skips[-1].shape[2:] if skips else None)
        return self.out(h).to(x.dtype)

    def with_control(self, h: Tensor, added: Tensor) -> Tensor:
        """Returns the sum of a map of the way down and what a control network adds to it, in the map's own layout."""
        return h.clone().add_(added.to(h.dtype))

    def with_skip(self, h: Tensor, skip: Tensor) -> Tensor:
        """Returns the input of an output block: the channels of the map from below and of the skip connection."""
        return torch.cat([h, skip], dim=1)
