from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ldm.images.mask import fade, hide, paste, to_latent_mask


def mask_of(height: int, width: int, rows: slice, columns: slice) -> Tensor:
    mask = torch.zeros(1, 1, height, width)
    mask[..., rows, columns] = 1
    return mask


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_latent_cell_is_repainted_if_any_of_its_pixels_is(dtype: torch.dtype) -> None:
    mask = mask_of(16, 24, slice(7, 8), slice(15, 16)).to(dtype)  # the last pixel of the second cell
    latent = to_latent_mask(mask, 8, nearest=False)
    assert latent.dtype == torch.float32
    assert latent.tolist() == [[[[0, 1, 0], [0, 0, 0]]]]


def test_nearest_takes_the_upper_left_pixel_of_each_cell() -> None:
    mask = noise(2, 1, 32, 48) > 0
    torch.testing.assert_close(to_latent_mask(mask, 8, nearest=True), mask[..., ::8, ::8].float())


def test_a_mask_off_the_latent_grid_is_refused() -> None:
    with pytest.raises(ValueError, match="20x16"):
        to_latent_mask(torch.zeros(1, 1, 16, 20), 8, nearest=False)


def test_fade_is_zero_outside_and_rises_to_one_inside() -> None:
    mask = mask_of(96, 96, slice(None), slice(32, None))
    row = fade(mask, 4.0)[0, 0, 48]
    assert row[:32].tolist() == [0.0] * 32
    inside = row[32:].tolist()
    assert inside == sorted(inside)
    assert 0 < inside[0] < 0.2
    assert inside[13:] == [1.0] * len(inside[13:])


def test_fade_at_a_straight_edge_is_the_error_function() -> None:
    """A half plane blurred by a Gaussian of sigma s is Phi(d / s), so the weight is erf(d / (s sqrt 2))."""
    mask = mask_of(96, 128, slice(None), slice(48, None))
    row = fade(mask, 6.0)[0, 0, 48, 48:110]
    expected = [math.erf((k + 0.5) / (6 * math.sqrt(2))) for k in range(62)]
    torch.testing.assert_close(row, torch.tensor(expected), atol=4e-3, rtol=0)


def test_fade_equals_kornias_own_blur_in_wide_places() -> None:
    kornia = pytest.importorskip("kornia")
    mask = mask_of(96, 96, slice(20, 70), slice(24, 76))
    blurred = kornia.filters.gaussian_blur2d(mask, (13, 13), (2.0, 2.0))
    torch.testing.assert_close(fade(mask, 2.0), mask * (2 * blurred - 1).clamp(0, 1), atol=6e-3, rtol=0)


@pytest.mark.parametrize("width", [1, 3, 8, 30])
def test_narrow_places_are_repainted_too(width) -> None:
    weight = fade(mask_of(64, 64, slice(None), slice(20, 20 + width)), 4.0)
    assert weight[0, 0, 32, 20 + (width - 1) // 2] > 0.99


def test_fade_leaves_unmasked_pixels_exactly_zero_whatever_the_mask() -> None:
    mask = noise(1, 1, 64, 64) > 0
    weight = fade(mask, 3.0)
    assert weight.dtype == torch.float32
    assert not weight[~mask].any()
    assert weight.min() >= 0
    assert weight.max() <= 1


def test_the_borders_of_the_picture_do_not_fade() -> None:
    assert torch.equal(fade(torch.ones(1, 1, 40, 56), 5.0), torch.ones(1, 1, 40, 56))
    columns = fade(mask_of(64, 64, slice(None), slice(0, 32)), 4.0)[0, 0]
    torch.testing.assert_close(columns, columns[:1].expand(64, 64))
    assert columns[0, 0] == 1


@pytest.mark.parametrize("blur", [0.3, 4.0, 500.0])
@pytest.mark.parametrize("shape", [(1, 1), (8, 8), (8, 200)])
def test_small_pictures_and_large_blurs(shape: tuple[int, int], blur: float) -> None:
    assert torch.equal(fade(torch.ones(1, 1, *shape), blur), torch.ones(1, 1, *shape))
    assert torch.equal(fade(torch.zeros(1, 1, *shape), blur), torch.zeros(1, 1, *shape))


def test_no_blur_is_the_mask_itself() -> None:
    mask = noise(1, 1, 16, 16) > 0
    assert torch.equal(fade(mask, 0.0), mask.float())


def test_paste_is_exact_at_both_ends_and_mixes_between() -> None:
    new, original = noise(2, 3, 16, 16), noise(2, 3, 16, 16).flip(0) * 1e3
    original[0, 0, 0, 0] = -0.0
    new[1, :, 0, 0] = float("nan")
    weight = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(2))
    weight[..., :8], weight[..., 12:] = 0, 1
    result = paste(new, original, weight)
    bits = torch.int32
    assert torch.equal(result[..., :8].view(bits), original[..., :8].contiguous().view(bits))
    assert torch.equal(result[..., 12:], new[..., 12:])
    between = (..., slice(8, 12))
    expected = weight.double() * new.double() + (1 - weight.double()) * original.double()
    torch.testing.assert_close(result[between].double(), expected[between], atol=1e-3, rtol=1e-5)


def test_the_hole_is_mid_grey() -> None:
    picture = noise(1, 3, 8, 8)
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 2, 2], mask[..., 3, 3], mask[..., 4, 4] = 1, 0.5, 0.49
    expected = picture.clone()
    expected[..., 2, 2] = expected[..., 3, 3] = 0
    assert torch.equal(hide(picture, mask), expected)
    assert torch.equal(hide(picture, mask >= 0.5), expected)
