from __future__ import annotations

import numpy as np
import pytest
import torch

from ldm.images.pixels import finite, to_uint8


def test_pixels_are_cut_off_not_rounded() -> None:
    almost = torch.tensor([254.999, 254.4, 0.999, 127.5, 128.0]) / 255 * 2 - 1
    column = to_uint8(almost.view(1, 1, 5, 1).expand(1, 3, 5, 1))[0, :, 0, 0]
    assert column.tolist() == [254, 254, 0, 127, 128]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pixels_equal_the_steps_of_the_original_in_numpy(dtype: torch.dtype) -> None:
    decoded = (torch.randn(2, 3, 40, 24, generator=torch.Generator().manual_seed(1))).to(dtype)
    as_numpy = decoded.float().numpy()
    unit = np.clip((as_numpy + np.float32(1)) / np.float32(2), 0, 1)
    expected = (np.float32(255) * unit).astype(np.uint8).transpose(0, 2, 3, 1)
    pixels = to_uint8(decoded)
    assert pixels.dtype == np.uint8
    assert pixels.shape == (2, 40, 24, 3)
    assert pixels.flags.c_contiguous
    np.testing.assert_array_equal(pixels, expected)


def test_values_outside_the_range_are_clamped() -> None:
    decoded = torch.tensor([-9.0, -1.0, 1.0, 9.0, float("inf")]).view(1, 1, 5, 1).expand(1, 3, 5, 1)
    assert to_uint8(decoded)[0, :, 0, 0].tolist() == [0, 0, 255, 255, 255]


def test_finite_names_the_bad_images_only() -> None:
    images = torch.zeros(4, 3, 8, 8)
    images[1, 2, 7, 7] = float("nan")
    images[3, 0, 0, 0] = float("-inf")
    assert finite(images) == [True, False, True, False]
