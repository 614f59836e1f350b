"""The compiled library against arithmetic in float64 and against torch's operations, which do the same without it."""

import math
import re

import pytest
import torch
from torch.nn import functional as F

from ldm.runtime import int8, kernels, native
from ldm.runtime.fast import FastGroupNorm, FastLayerNorm
from ldm.scaled import ScaledWeight
from tests.support.golden_data import relative_error

needs_library = pytest.mark.skipif(native.library() is None, reason="the library was not compiled here")
needs_tiles = pytest.mark.skipif(
    not kernels.has_matrix_units() or native.library() is None, reason="no matrix units, or no library"
)

needs_bf16 = pytest.mark.skipif(
    not native.has_bf16() or native.library() is None, reason="no instructions for bf16, or no library"
)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(5)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def normal(*shape, scale=1.0):
    return (scale * torch.randn(shape)).bfloat16()


def expected_attention(q, k, v, heads):
    q, k, v = (x.double().unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


@needs_tiles
@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0])
@pytest.mark.parametrize(
    ("batch", "queries", "keys", "heads", "width"),
    [
        (2, 64, 64, 8, 40),
        (1, 33, 77, 3, 80),
        (3, 1, 1, 1, 2),
        (1, 300, 545, 2, 160),
        (2, 31, 255, 5, 64),
        (1, 70, 257, 1, 34),
    ],
)
def test_attention(batch, queries, keys, heads, width, scale):
    q, k = normal(batch, queries, heads * width, scale=scale), normal(batch, keys, heads * width, scale=scale)
    v = normal(batch, keys, heads * width)
    assert native.can_attend(q, heads)
    # weights and results are bf16: 1.7e-3 were measured, for torch's kernel too
    got = native.attend(q, k, v, heads)
    assert got.is_contiguous()
    assert relative_error(got.double(), expected_attention(q, k, v, heads)) <= 2.5e-3


@needs_tiles
def test_attention_of_views_and_of_one_sample_for_all():
    both = normal(3, 50, 3 * 80)
    q, k, v = both.chunk(3, dim=-1)
    assert relative_error(native.attend(q, k, v, 2).double(), expected_attention(q, k, v, 2)) <= 2.5e-3
    assert torch.equal(native.attend(q, k[:1], v[:1], 2)[:1], native.attend(q, k, v, 2)[:1])
    turned = v.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(native.attend(q, k, turned, 2), native.attend(q, k, v, 2))


@needs_tiles
def test_equal_keys_give_the_mean_however_large_the_scores():
    v = normal(1, 300, 40)
    for size in (0.0, 300.0, 1e18, -1e18):
        q, k = torch.full((1, 40, 40), size).bfloat16(), torch.full((1, 300, 40), abs(size)).bfloat16()
        got = native.attend(q, k, v, 1)
        assert relative_error(got.float(), v.float().mean(1, keepdim=True).expand(1, 40, 40)) <= 8e-3


@needs_tiles
def test_the_greatest_score_may_come_last():
    k = torch.linspace(0, 60, 600)[None, :, None].expand(1, 600, 40).bfloat16()
    q, v = torch.full((1, 5, 40), 0.5).bfloat16(), normal(1, 600, 40)
    assert relative_error(native.attend(q, k, v, 1).double(), expected_attention(q, k, v, 1)) <= 2.5e-3


@needs_tiles
def test_what_is_not_a_number_stays_visible_in_its_row():
    q, k, v = normal(1, 40, 40), normal(1, 40, 40), normal(1, 40, 40)
    q[0, 7, 3] = math.nan
    rows = native.attend(q, k, v, 1).isnan().any(-1)[0]
    assert rows.nonzero().flatten().tolist() == [7]


@needs_tiles
def test_the_number_of_threads_changes_nothing(threads):
    q, k, v = normal(1, 130, 80), normal(1, 90, 80), normal(1, 90, 80)
    results = []
    for count in (1, 2, 3, 7):
        threads(count)
        results.append(native.attend(q, k, v, 2))
    assert all(torch.equal(results[0], other) for other in results[1:])


@needs_tiles
def test_shapes_that_do_not_fit_are_refused():
    q, k = normal(1, 5, 40), normal(1, 7, 40)
    for others in ((k, normal(1, 6, 40)), (normal(1, 7, 48), normal(1, 7, 48))):
        with pytest.raises(ValueError, match="no attention with 2 heads"):
            native.attend(q, *others, 2)
    with pytest.raises(ValueError, match="no attention with 3 heads"):
        native.attend(q, k, k, 3)
    assert native.attend(q[:0], k[:0], k[:0], 2).shape == (0, 5, 40)


@needs_tiles
def test_attention_uses_it_where_it_can(monkeypatch):
    calls = []
    monkeypatch.setattr(native, "attend", lambda q, k, v, heads: calls.append(q) or q)
    q = normal(1, 32, 80)
    kernels.attend(q, q, q, 2)
    assert len(calls) == 1
    for other, heads in ((q.float(), 2), (normal(1, 8, 512), 1)):
        kernels.attend(other, other, other, heads)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")  # a user's limit for oneDNN holds for all
    kernels.attend(q, q, q, 2)
    assert len(calls) == 1


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 15, 16, 1000, 70001])
def test_bytes_are_those_of_torch(dtype, count, threads, monkeypatch):
    x = (3 * torch.randn(count) + 1).to(dtype)
    found = []
    for there in (True, False):
        threads(2)
        monkeypatch.setattr(native, "can_round", lambda x, there=there: there)
        found.append((int8.as_input(x), int8.as_input(int8.Silu(x.clone()))))
    (plain, soft), (other, other_soft) = found
    assert (plain.scale, plain.zero) == (other.scale, other.zero)
    assert torch.equal(plain.bytes, other.bytes)
    assert (soft.scale, soft.zero) == (other_soft.scale, other_soft.zero)
    differences = (soft.bytes.int() - other_soft.bytes.int()).abs()
    assert differences.max() <= 1  # where a value is half-way between two bytes but for rounding
    assert differences.sum() <= 1 + count / 500


def test_a_margin_holds_zeros():
    x = torch.randn(2, 5, 4, 3).contiguous(memory_format=torch.channels_last)
    plain, wide = int8.as_input(x), int8.as_input(x, margin=(1, 2))
    assert wide.bytes.shape == (2, 5, 6, 7)
    assert wide.shape == plain.shape == x.shape
    assert torch.equal(wide.bytes, F.pad(plain.bytes, (2, 2, 1, 1), value=plain.zero))


@needs_library
@pytest.mark.parametrize("amiss", [math.nan, math.inf])
def test_extremes_show_what_is_not_a_number(amiss):
    x = torch.zeros(100)
    x[99] = amiss
    low, high = native.extremes(x)
    assert math.isnan(high) if math.isnan(amiss) else (low, high) == (0, math.inf)


@needs_library
def test_silu_of_the_largest_and_smallest_numbers():
    x = torch.tensor([-3e38, -100.0, -20.0, 0.0, 20.0, 100.0, 200.0])
    rounded = int8.as_input(int8.Silu(x.clone()))
    value = rounded.scale * (rounded.bytes.float() - rounded.zero)
    assert (value - F.silu(x)).abs().max() <= rounded.scale / 2 * 1.001


@needs_bf16
@pytest.mark.parametrize(("shape", "groups"), [((2, 320, 9, 7), 32), ((3, 48, 20, 5), 4), ((1, 6, 1, 3), 2)])
@torch.inference_mode()
def test_group_norm(shape, groups, threads):
    x = (3 * torch.randn(shape) + 5).bfloat16().contiguous(memory_format=torch.channels_last)
    norm = FastGroupNorm(groups, shape[1], eps=1e-5)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    expected = F.group_norm(x.double(), groups, norm.weight.double(), norm.bias.double(), 1e-5)
    for count in (1, 3):
        threads(count)
        got = norm(x)
        assert got.is_contiguous(memory_format=torch.channels_last)
        assert relative_error(got.double(), expected) <= 2.5e-3  # the rounding of results to bf16
        assert relative_error(norm(x, silu=True).double(), F.silu(expected)) <= 2.5e-3


@needs_bf16
@pytest.mark.parametrize("shape", [(2, 5, 320), (77, 40), (1, 3)])
@torch.inference_mode()
def test_layer_norm(shape):
    x = (3 * torch.randn(shape) + 5).bfloat16()
    norm = FastLayerNorm(shape[-1])
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    expected = F.layer_norm(x.double(), shape[-1:], norm.weight.double(), norm.bias.double(), 1e-5)
    assert relative_error(norm(x).double(), expected) <= 2.5e-3


@needs_bf16
def test_norms_show_what_is_not_a_number_where_torch_does():
    x = normal(2, 8, 3, 3).contiguous(memory_format=torch.channels_last)
    x[1, 5, 0, 0] = math.nan
    found = FastGroupNorm(4, 8)(x).isnan()
    assert torch.equal(found, F.group_norm(x, 4).isnan())
    tokens = normal(3, 16)
    tokens[2, 4] = math.inf
    assert torch.equal(FastLayerNorm(16)(tokens).isnan(), F.layer_norm(tokens, (16,)).isnan())


@needs_bf16
def test_equal_values_are_normalised_to_the_bias():
    x = torch.full((1, 8, 4, 4), 300.0).bfloat16().contiguous(memory_format=torch.channels_last)
    assert FastGroupNorm(2, 8)(x).abs().max() <= 300 / 1e-5**0.5 * 2**-23
    assert FastLayerNorm(16)(torch.full((2, 16), -70.0).bfloat16()).eq(0).all()


@needs_bf16
def test_norms_of_other_inputs_are_left_to_torch(monkeypatch):
    def fail(*args):
        raise AssertionError(args)

    monkeypatch.setattr(native, "group_norm", fail)
    monkeypatch.setattr(native, "layer_norm", fail)
    x = normal(2, 8, 3, 3)
    FastGroupNorm(4, 8)(x)  # not channels-last
    FastGroupNorm(4, 8)(x.float().contiguous(memory_format=torch.channels_last))
    FastGroupNorm(4, 8, affine=False)(x.contiguous(memory_format=torch.channels_last))
    FastGroupNorm(4, 8)(normal(2, 8, 9))
    FastLayerNorm((3, 3))(x)
    FastLayerNorm(3, bias=False)(x)
    eight_bits = FastLayerNorm(3)
    scaled = ScaledWeight(torch.ones(3, dtype=torch.int8), torch.full((3,), 2.0))
    eight_bits.load_state_dict({"weight": scaled, "bias": torch.zeros(3)}, assign=True)
    assert relative_error(eight_bits(x).detach().float(), 2 * F.layer_norm(x.float(), (3,))) <= 1e-2


@pytest.mark.parametrize("amiss", ["off", "missing", "damaged", "older"])
def test_without_the_library_there_is_none(amiss, tmp_path, monkeypatch):
    monkeypatch.setattr(native, "library", native.library.__wrapped__)  # not the one that is cached
    if amiss == "off":
        monkeypatch.setenv(native.SWITCH, "off")
    elif amiss == "older":
        monkeypatch.setattr(native, "VERSION", 0)
    else:
        monkeypatch.setattr(native, "LIBRARY", tmp_path / "libnative.so")
    if amiss == "damaged":
        (tmp_path / "libnative.so").write_bytes(b"not a library")
    assert native.library() is None
    assert not native.can_round(torch.zeros(3))


def test_both_files_have_one_version():
    source = native.LIBRARY.with_name("native.c").read_text(encoding="utf-8")
    assert re.findall(r"#define VERSION (\d+)", source) == [str(native.VERSION)]
