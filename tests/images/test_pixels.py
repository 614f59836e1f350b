from __future__ import annotations

import numpy as np
import pytest
import torch

from ldm.images.pixels import finite, from_uint8, to_uint8


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


def test_bytes_become_the_floats_of_the_original() -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (2, 24, 40, 3), dtype=np.uint8)
    one = np.array(pixels[1]).astype(np.float32) / 255.0  # as img2img.py of the original did, image by image
    expected = 2.0 * torch.from_numpy(one[None].transpose(0, 3, 1, 2)) - 1.0
    tensor = from_uint8(pixels)
    assert tensor.shape == (2, 3, 24, 40)
    assert tensor.dtype == torch.float32
    assert tensor.is_contiguous()
    assert torch.equal(tensor[1:], expected)
    assert from_uint8(np.full((1, 8, 8, 3), 255, np.uint8)).unique().tolist() == [1.0]


def test_read_only_pixels_are_taken_and_left_alone() -> None:
    pixels = np.zeros((1, 8, 8, 3), np.uint8)
    pixels.flags.writeable = False
    assert from_uint8(pixels).unique().tolist() == [-1.0]
