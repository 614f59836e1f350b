"""The autoencoder in bounded memory: a large image is processed in overlapping tiles.

Operations on the whole image (group norms, attention at the lowest level) are then limited to a tile, so tiles are an
approximation; nothing else differs, and the tiles are blended without a seam.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

Network = Callable[[Tensor], Tensor]
Tiling = Literal["auto", "on", "off"]

TILES = 64, 32  # sides in latent cells, and the one used if even the first does not fit
SHARE = 0.75  # of the available memory that a decoding may use: the images themselves need some as well
# Measured on a CPU, in float32 (autocast takes half): the peak grows by 7.6 to 10.4 times ch * pixels * 4 bytes for
# widths of ch and 2 ch, of which 6 are tensors and the rest copies made by the convolutions.
LIVE_MAPS = 5.25


# --- tiles --------------------------------------------------------------------------------------------------


def decode_in_tiles(decode: Network, z: Tensor, factor: int, tile: int = 64, overlap: int = 16) -> Tensor:
    """Decodes latents [N, C, h, w] to images [N, 3, factor * h, factor * w]; `decode` sees one tile at a time.

    Tiles are `tile` latent cells a side and overlap by at least `overlap` cells. Latents that fit into one tile go
    through `decode` as they are; otherwise the result is float32. Raises ValueError unless the overlap is smaller
    than the tile.
    """
    return _in_tiles(decode, z, tile, overlap, enter=1, leave=factor)


def encode_in_tiles(encode: Network, x: Tensor, factor: int, tile: int = 64, overlap: int = 16) -> Tensor:
    """Encodes images [N, 3, H, W] to the moments [N, 2C, H / factor, W / factor] of their latents, tile by tile.

    `encode` returns the moments as one tensor: `lambda x: autoencoder.encode(x).parameters`. `tile` and `overlap`
    count latent cells, as in `decode_in_tiles`. Raises ValueError if a side is not a multiple of `factor`.
    """
    if any(side % factor for side in x.shape[-2:]):
        raise ValueError(f"an image of {tuple(x.shape[-2:])} pixels cannot be cut into cells of {factor}")
    return _in_tiles(encode, x, tile, overlap, enter=factor, leave=1)


def _in_tiles(network: Network, x: Tensor, tile: int, overlap: int, enter: int, leave: int) -> Tensor:
    """Applies `network` to `x`, where a latent cell spans `enter` values a side in `x` and `leave` in the result."""
    if not 0 <= overlap < tile:
        raise ValueError(f"tiles of {tile} cells cannot overlap by {overlap}")
    height, width = (side // enter for side in x.shape[-2:])
    if max(height, width) <= tile:
        return network(x)
    result = None
    for rows, weight_y in _strips(height, tile, overlap, leave):
        for columns, weight_x in _strips(width, tile, overlap, leave):
            piece = network(x[..., _scaled(rows, enter), _scaled(columns, enter)])
            if result is None:
                result = piece.new_zeros(
                    (*piece.shape[:2], height * leave, width * leave), dtype=torch.float32
                )
            weights = weight_y.to(result)[:, None] * weight_x.to(result)
            result[..., _scaled(rows, leave), _scaled(columns, leave)].addcmul_(piece.float(), weights)
    assert result is not None
    return result


def _scaled(cells: slice, by: int) -> slice:
    return slice(cells.start * by, cells.stop * by)


def _strips(size: int, tile: int, overlap: int, scale: int) -> Iterator[tuple[slice, Tensor]]:
    """Returns the tiles along one axis of `size` cells, and the weight of each at its `scale` values a cell."""
    tile = min(tile, size)
    starts = tile_starts(size, tile, overlap)
    weights = blending_weights(starts, tile, scale)
    return ((slice(a, a + tile), weight) for a, weight in zip(starts, weights, strict=True))


def tile_starts(size: int, tile: int, overlap: int) -> list[int]:
    """Returns the even starts of the fewest tiles that cover `size` cells and overlap by `overlap` or more."""
    if size <= tile:
        return [0]
    count = 1 - (tile - size) // (tile - overlap)
    return [i * (size - tile) // (count - 1) for i in range(count)]


def blending_weights(starts: Sequence[int], tile: int, scale: int) -> Tensor:
    """Returns weights [tiles, tile * scale] that sum to 1 wherever tiles overlap along an axis.

    A tile's weight rises from 0 at its end in a half period of the cosine, over the whole overlap with its neighbour:
    where it lacks context it counts least, and the weight has no kink.
    """
    length, last = tile * scale, starts[-1]
    from_start = torch.arange(length, dtype=torch.float64) + 0.5
    raw = torch.ones(len(starts), length, dtype=torch.float64)
    for i, (a, b) in enumerate(pairwise(starts)):
        rise = _half_cosine(from_start / ((a + tile - b) * scale))
        raw[i] *= rise.flip(0)
        raw[i + 1] *= rise
    total = torch.zeros((last + tile) * scale, dtype=torch.float64)
    for a, weight in zip(starts, raw, strict=True):
        total[a * scale :][:length] += weight
    return torch.stack([weight / total[a * scale :][:length] for a, weight in zip(starts, raw, strict=True)])


def _half_cosine(x: Tensor) -> Tensor:
    """Returns 0 at 0 and below, 1 at 1 and above, and half a period of the cosine between."""
    return (1.0 - torch.cos(torch.pi * x.clamp(0.0, 1.0))) / 2.0


# --- memory -------------------------------------------------------------------------------------------------


def needed_memory(widths: Sequence[int], pixels: int) -> int:
    """Estimates the bytes for decoding one image of `pixels` in float32, without the weights.

    `widths` are the channels of the autoencoder's levels, the finest first: `ch` times each of `ch_mult`. The peak
    is where the finest level is entered, with the channels of the next one at full size.
    """
    return int(4 * LIVE_MAPS * max(widths[:2]) * pixels)


def choose_tiles(needed: int, available: int | None) -> bool:
    """Returns whether to decode in tiles: `needed` bytes are more than the usual share of those available."""
    return available is not None and needed > SHARE * available


def choose_tile(
    tiles: Tiling,
    widths: Sequence[int],
    factor: int,
    size: tuple[int, int],
    available: int | None,
) -> int | None:
    """Returns the side in latent cells of the tiles for images of a height and width; None for no tiles.

    `widths` are the channels of the autoencoder's levels, `factor` is its downsampling, `available` the free bytes.
    """
    large, small = TILES
    height, width = size

    def fits(pixels: int) -> bool:
        return not choose_tiles(needed_memory(widths, pixels), available)

    if tiles == "off" or (tiles == "auto" and fits(height * width)):
        return None
    tile = large if fits((large * factor) ** 2) else small
    return tile if max(height, width) > tile * factor else None
