"""Self-attention without text, which U-Nets before the text-conditioned ones had."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.modules.diffusionmodules.util import checkpoint, conv_nd, normalization, zero_module


class AttentionBlock(nn.Module):
    """Self-attention between the pixels of [N, channels, *spatial], residual and without text.

    The U-Net of this package uses transformers instead; extensions of the original import it from `openaimodel`. The
    heads are `num_heads`, or have `num_head_channels` each. The rows of `qkv` are query, key, value within each head,
    and with `use_new_attention_order` heads within each of the three.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int = 1,
        num_head_channels: int = -1,
        use_checkpoint: bool = False,
        use_new_attention_order: bool = False,
    ):
        super().__init__()
        self.channels, self.use_checkpoint = channels, use_checkpoint
        self.num_heads = num_heads if num_head_channels == -1 else channels // num_head_channels
        self.order = "n (k h d) p -> k n h p d" if use_new_attention_order else "n (h k d) p -> k n h p d"
        self.norm = normalization(channels)
        self.qkv = conv_nd(1, channels, 3 * channels, 1)
        self.proj_out = zero_module(conv_nd(1, channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self._forward, (x,), self.parameters(), self.use_checkpoint)

    def _forward(self, x: Tensor) -> Tensor:
        pixels = x.flatten(2)
        q, k, v = rearrange(self.qkv(self.norm(pixels)), self.order, k=3, h=self.num_heads)
        seen = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(rearrange(seen, "n h p d -> n (h d) p")).reshape(x.shape)
