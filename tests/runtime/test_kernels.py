import pytest
import torch
from torch.nn import functional as F

from ldm.runtime import kernels
from tests.support.golden_data import TOLERANCE, relative_error
from tests.support.precision import EACH_PACKED

ROUNDING = {torch.float32: TOLERANCE, torch.bfloat16: 8e-3}
DTYPES = list(ROUNDING)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(3)


@pytest.mark.parametrize("dtype", EACH_PACKED)
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), [(3, 1, 1), (1, 1, 0), (3, 2, 1), (3, 2, 0), (2, 1, 1)]
)
def test_convolution(dtype, add, kernel, stride, padding):
    x, weight, bias = torch.randn(2, 24, 9, 7), torch.randn(40, 24, kernel, kernel) / 10, torch.randn(40)
    expected = F.conv2d(x, weight, bias, stride=stride, padding=padding)
    residual = torch.randn_like(expected) if add else None
    sides = (stride, stride), (padding, padding)
    packed = kernels.pack_convolution(weight, dtype, *sides, x.shape)
    got = kernels.convolve(x, packed, bias, *sides, residual)
    assert got.dtype is dtype
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert (
        relative_error(got.float(), expected if residual is None else expected + residual) <= ROUNDING[dtype]
    )


@pytest.mark.parametrize("dtype", EACH_PACKED)
def test_matrix_products(dtype):
    x, weight, bias = torch.randn(2, 5, 24), torch.randn(40, 24) / 5, torch.randn(40)
    other, packed = torch.randn(2, 5, 40).to(dtype), kernels.pack_linear(weight, dtype)
    product = F.linear(x, weight, bias)
    for options, expected in (
        ({}, product),
        ({"add": other}, product + other),
        ({"times": other}, product * other),
        ({"gelu": True}, F.gelu(product)),
    ):
        got = kernels.multiply(x, packed, bias, **options)
        assert got.dtype is dtype
        assert relative_error(got.float(), expected) <= ROUNDING[dtype]


@pytest.mark.parametrize("size", [(1, 1), (1, 6), (5, 4)])
def test_doubling_the_size_inside_a_convolution(size):
    x, weight, bias = torch.randn(2, 8, *size), torch.randn(12, 8, 3, 3), torch.randn(12)
    expected = F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)
    packed = [
        kernels.pack_convolution(part, torch.float32, (1, 1), (1, 1), x.shape)
        for part in kernels.parity_weights(weight)
    ]
    got = kernels.convolve_doubled(x, packed, bias)
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert relative_error(got, expected) <= TOLERANCE


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("queries", "keys", "heads", "width"), [(70, 70, 8, 40), (33, 7, 2, 80), (1, 5, 1, 512)]
)
@pytest.mark.parametrize("scores", [2**20, 64, 1])
def test_attention(dtype, queries, keys, heads, width, scores, monkeypatch):
    monkeypatch.setattr(kernels, "SCORES", scores)
    q, k, v = (torch.randn(3, n, heads * width).to(dtype) for n in (queries, keys, keys))
    expected = F.scaled_dot_product_attention(
        *(y.float().unflatten(-1, (heads, width)).transpose(1, 2) for y in (q, k, v))
    )
    expected = expected.transpose(1, 2).flatten(2)
    for attend in (kernels.attend, kernels.attend_in_slices):
        got = attend(q, k, v, heads)
        assert got.dtype is dtype
        assert relative_error(got.float(), expected) <= ROUNDING[dtype]


def test_large_scores_do_not_overflow():
    q = torch.full((1, 4, 40), 100.0, dtype=torch.bfloat16)
    v = torch.randn(1, 4, 40).to(torch.bfloat16)
    got = kernels.attend_in_slices(q, q, v, 1)
    assert relative_error(got.float(), v.float().mean(1, keepdim=True).expand(1, 4, 40)) <= 8e-3
