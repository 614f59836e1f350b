"""Masks as tensors: for the sampler, for blending in new pixels, and for inpainting models.

Everywhere 1 (or True) is repainted and 0 is kept.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

_REACH = 3.0  # the Gaussian is cut off at this many sigmas
_WHOLE = 1e-5  # the rounding error allowed between 1 and the blur of ones


def to_latent_mask(repaint: Tensor, factor: int, nearest: bool) -> Tensor:
    """Returns a mask [B, 1, H, W] on the latent's grid: float32 [B, 1, H/factor, W/factor].

    With `nearest` a cell has the value of its upper left pixel, as the published inpainting app of Stable
    Diffusion 1.5 does; otherwise it is repainted if any of its pixels is. Raises ValueError for sides that are
    not multiples of `factor`.
    """
    height, width = repaint.shape[-2:]
    if height % factor or width % factor:
        raise ValueError(f"a mask of {width}x{height} has no latent grid of {factor} pixels a cell")
    if nearest:
        return F.interpolate(repaint.float(), size=(height // factor, width // factor))
    return F.max_pool2d(repaint.float(), factor)


def fade(repaint: Tensor, blur: float) -> Tensor:
    """Returns the weight of the new image at each pixel: float32 [B, 1, H, W] in [0, 1], for a mask of that shape.

    With G the Gaussian of sigma `blur` in pixels and P its maximum nearby (1 in wide places, less in narrow ones)
    it is `repaint * clamp(2 G(repaint) / P - 1, 0, 1)`: exactly 0 wherever nothing is repainted, so those pixels
    can stay as they are, and rising to exactly 1 inside. The mask extends beyond the image's borders, so it
    does not fade there. Blur 0 returns the mask itself.
    """
    repaint = repaint.float()
    if blur <= 0:
        return repaint
    from kornia.filters import gaussian_blur2d  # type: ignore[reportPrivateImportUsage]

    reach = min(math.ceil(_REACH * blur), max(repaint.shape[-2:]))
    size = 2 * reach + 1
    blurred = gaussian_blur2d(repaint, (size, size), (blur, blur), border_type="replicate")
    highest = F.max_pool2d(blurred, (1, size), stride=1, padding=(0, reach))
    highest = F.max_pool2d(highest, (size, 1), stride=1, padding=(reach, 0))
    share = blurred / highest.clamp_min(_WHOLE)
    weight = repaint * (2 * share - 1).clamp(0, 1)
    return torch.where(share > 1 - _WHOLE, repaint, weight)


def paste(new: Tensor, original: Tensor, weight: Tensor) -> Tensor:
    """Mixes float images [B, 3, H, W] by `weight` [B, 1, H, W]: bit for bit `original` at 0 and `new` at 1."""
    mixed = torch.lerp(original, new, weight.to(new.dtype))
    return torch.where(weight == 0, original, torch.where(weight == 1, new, mixed))


def hide(image: Tensor, repaint: Tensor) -> Tensor:
    """Returns an image [B, 3, H, W] in [-1, 1] with mid-grey repainted pixels, the input of inpainting models."""
    return image * (repaint < 0.5)
