from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ldm.config import read_config
from ldm.data.scenes import image_at
from ldm.models.autoencoder import AutoencoderKL
from ldm.pipeline import load_model
from ldm.runtime.tiling import (
    blending_weights,
    choose_tiles,
    decode_in_tiles,
    encode_in_tiles,
    needed_memory,
    tile_starts,
)

FACTOR = 8
CUTS = [(16, 4), (16, 0), (16, 12), (24, 8), (5, 2)]


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def enlarged(z: Tensor) -> Tensor:
    """A decoder that sees one cell at a time."""
    return F.interpolate(z[:, :3].sin(), scale_factor=FACTOR, mode="nearest")


# --- weights and tiles --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [16, 17, 23, 31, 64, 65, 200])
@pytest.mark.parametrize(("tile", "overlap"), [cut for cut in CUTS if cut[0] <= 16])
def test_weights_sum_to_one_and_neighbours_overlap_enough(size: int, tile: int, overlap: int) -> None:
    starts = tile_starts(size, tile, overlap)
    total = torch.zeros(size * FACTOR, dtype=torch.float64)
    for start, weight in zip(starts, blending_weights(starts, tile, FACTOR), strict=True):
        assert weight.min() >= 0
        total[start * FACTOR : (start + tile) * FACTOR] += weight
    torch.testing.assert_close(total, torch.ones_like(total), atol=1e-12, rtol=0)
    assert starts[0] == 0
    assert starts[-1] == size - tile
    assert all(b - a <= tile - overlap for a, b in pairwise(starts))


def test_two_tiles_share_their_overlap_by_the_half_cosine() -> None:
    left, right = blending_weights([0, 4], 8, 1)
    expected = torch.cos(torch.pi * (torch.arange(4, dtype=torch.float64) + 0.5) / 8) ** 2
    torch.testing.assert_close(left, torch.cat([torch.ones(4).double(), expected]))
    torch.testing.assert_close(right, left.flip(0))


@pytest.mark.parametrize("side", [(40, 40), (17, 40), (33, 21), (8, 90), (90, 8)])
@pytest.mark.parametrize(("tile", "overlap"), CUTS)
def test_what_sees_single_cells_is_not_changed_by_tiles(
    side: tuple[int, int], tile: int, overlap: int
) -> None:
    z = noise(2, 4, *side)
    torch.testing.assert_close(
        decode_in_tiles(enlarged, z, FACTOR, tile, overlap), enlarged(z), atol=1e-6, rtol=0
    )
    x = enlarged(z)
    torch.testing.assert_close(
        encode_in_tiles(lambda y: F.avg_pool2d(y, FACTOR), x, FACTOR, tile, overlap),
        F.avg_pool2d(x, FACTOR),
        atol=1e-6,
        rtol=0,
    )


def test_no_tile_is_larger_than_asked_and_all_are_equal() -> None:
    seen: list[torch.Size] = []

    def decode(z: Tensor) -> Tensor:
        seen.append(z.shape)
        return enlarged(z)

    decode_in_tiles(decode, noise(1, 4, 9, 100), FACTOR, 16, 4)
    assert seen == [(1, 4, 9, 16)] * 8


def test_half_precision_is_blended_in_float32() -> None:
    z = noise(1, 4, 30, 30).half()
    assert decode_in_tiles(enlarged, z, FACTOR, 16, 4).dtype == torch.float32


def test_impossible_cuts_are_refused() -> None:
    with pytest.raises(ValueError, match="16 cells cannot overlap by 16"):
        decode_in_tiles(enlarged, noise(1, 4, 30, 30), FACTOR, 16, 16)
    with pytest.raises(ValueError, match="cells of 8"):
        encode_in_tiles(enlarged, noise(1, 3, 30, 32), FACTOR)


# --- the bundled autoencoder --------------------------------------------------------------------------------

TILE, OVERLAP = 16, 8
MEAN_ERROR = 0.06  # of a range of 2; small tiles are the hard case: their norms see half a scene


@pytest.fixture(scope="module")
def autoencoder() -> AutoencoderKL:
    config = read_config("configs/shapes/shapes-inference.yaml")
    return load_model(config, "models/ldm/shapes/model.ckpt").first_stage_model


@pytest.fixture(scope="module")
def scenery() -> Tensor:
    """Four scenes in two rows and columns, their borders away from those of tiles: [1, 3, 256, 256]."""
    rows = [np.concatenate([image_at(i, "fresh"), image_at(i + 1, "fresh")], axis=1) for i in (0, 2)]
    moved = np.roll(np.concatenate(rows), (37, 53), axis=(0, 1))
    return torch.from_numpy(moved).permute(2, 0, 1)[None].float() / 127.5 - 1


def seam_ratio(difference: Tensor, scale: int) -> float:
    """The mean step between neighbouring values at the ends of tiles, over that everywhere else.

    A step is the absolute difference along an axis; at an end are those within one value of it.
    """
    at_ends, elsewhere = [], []
    for axis in (2, 3):
        steps = difference.diff(dim=axis).abs().transpose(axis, 3).flatten(0, 2).mean(0)
        starts = tile_starts(difference.shape[axis] // scale, TILE, OVERLAP)
        ends = [a * scale for a in starts[1:]] + [(a + TILE) * scale for a in starts[:-1]]
        near = torch.zeros_like(steps, dtype=torch.bool)
        for end in ends:
            near[end - 2 : end + 1] = True
        at_ends.append(steps[near])
        elsewhere.append(steps[~near])
    return float(torch.cat(at_ends).mean() / torch.cat(elsewhere).mean())


def test_the_seam_measure_sees_a_seam() -> None:
    difference = 0.01 * noise(1, 3, 256, 256)
    assert seam_ratio(difference, FACTOR) == pytest.approx(1, abs=0.05)
    difference[..., 64:] += 0.1
    assert seam_ratio(difference, FACTOR) > 1.3


@pytest.mark.long
@torch.inference_mode()
def test_pictures_in_tiles_are_close_and_show_no_seam(autoencoder: AutoencoderKL, scenery: Tensor) -> None:
    z = autoencoder.encode(scenery).mode()
    whole = autoencoder.decode(z)
    tiled = decode_in_tiles(autoencoder.decode, z, FACTOR, TILE, OVERLAP)
    assert (tiled - whole).abs().mean() < MEAN_ERROR
    assert seam_ratio(tiled - whole, FACTOR) < 1.1


@torch.inference_mode()
def test_one_tile_is_the_whole_to_the_bit(autoencoder: AutoencoderKL, scenery: Tensor) -> None:
    corner = scenery[..., :64, :96]
    moments = autoencoder.encode(corner).parameters
    one = encode_in_tiles(lambda x: autoencoder.encode(x).parameters, corner, FACTOR, 12, 4)
    assert torch.equal(one, moments)
    z = moments[:, :4]
    assert torch.equal(decode_in_tiles(autoencoder.decode, z, FACTOR, 12, 4), autoencoder.decode(z))


# --- memory -------------------------------------------------------------------------------------------------


def test_tiles_are_chosen_before_memory_is_short() -> None:
    assert choose_tiles(needed=80, available=100)
    assert not choose_tiles(needed=70, available=100)
    assert not choose_tiles(10**15, None)  # unknown


@pytest.mark.parametrize(
    ("widths", "side", "measured"),  # growth of the resident set at its peak, MiB
    [
        ([32, 64, 64, 128], 512, 269),
        ([32, 64, 64, 128], 1024, 948),
        ([128, 256, 512, 512], 256, 308),
        ([128, 256, 512, 512], 512, 1002),
    ],
)
def test_needed_memory_covers_what_was_measured(widths: list[int], side: int, measured: int) -> None:
    assert 1 <= needed_memory(widths, side * side) / 2**20 / measured < 1.5
