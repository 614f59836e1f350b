from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.images.resample import enlarge_latents, enlarge_pixels


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def lanczos_matrix(size: int, enlarged: int) -> torch.Tensor:
    """Lanczos with three lobes in closed form, weights normalised at the edges: [enlarged, size]."""
    centres = (torch.arange(enlarged, dtype=torch.float64) + 0.5) * size / enlarged - 0.5
    distance = centres[:, None] - torch.arange(size)
    weights = torch.sinc(distance) * torch.sinc(distance / 3) * (distance.abs() < 3)
    return weights / weights.sum(1, keepdim=True)


@pytest.mark.parametrize("size", [(24, 30), (20, 15), (13, 17)])
def test_pixels_follow_the_lanczos_formula(size: tuple[int, int]) -> None:
    x = 0.2 * noise(2, 3, 12, 15)
    rows, columns = lanczos_matrix(12, size[0]), lanczos_matrix(15, size[1])
    expected = torch.einsum("yh,nchw,xw->ncyx", rows, x.double(), columns)
    torch.testing.assert_close(enlarge_pixels(x, *size).double(), expected, atol=1e-5, rtol=0)


def test_pixels_agree_with_pillow_up_to_its_eight_bits() -> None:
    pixels = np.random.default_rng(0).integers(60, 196, (10, 14, 3), dtype=np.uint8)
    by_pillow = np.asarray(Image.fromarray(pixels).resize((28, 25), Image.Resampling.LANCZOS))
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
    difference = (enlarge_pixels(x, 25, 28)[0].permute(1, 2, 0) + 1) * 127.5 - torch.from_numpy(
        by_pillow.copy()
    )
    assert difference.abs().max() < 1.5  # Pillow rounds after each of its two passes
    assert difference.abs().max() > 0.1  # and these pixels are not rounded


def test_a_sharp_edge_stays_within_the_range_of_pixels() -> None:
    x = torch.ones(1, 3, 8, 8)
    x[..., 4:] = -1
    enlarged = enlarge_pixels(x, 20, 20)
    assert enlarged.min() == -1
    assert enlarged.max() == 1


@pytest.mark.parametrize("value", [-1.0, 0.123456, 1.0])
def test_constant_pictures_and_latents_stay_constant(value: float) -> None:
    x = torch.full((2, 3, 8, 12), value)
    torch.testing.assert_close(enlarge_pixels(x, 11, 30), torch.full((2, 3, 11, 30), value))
    torch.testing.assert_close(enlarge_latents(x, 11, 30), torch.full((2, 3, 11, 30), value))


def test_a_row_of_latents_in_closed_form() -> None:
    z = torch.tensor([0.0, 4.0]).view(1, 1, 1, 2)
    assert enlarge_latents(z, 2, 4).tolist() == [[[[0.0, 1.0, 3.0, 4.0]] * 2]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_dtype_is_kept(dtype: torch.dtype) -> None:
    assert enlarge_pixels(torch.zeros(1, 3, 8, 8, dtype=dtype), 16, 16).dtype == dtype
    assert enlarge_latents(torch.zeros(1, 4, 8, 8, dtype=dtype), 16, 16).dtype == dtype
