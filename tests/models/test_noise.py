"""Noise sources against a scalar Philox written here, published vectors and torch's generators."""

import dataclasses
import math
import time
from collections import Counter

import numpy as np
import pytest
import torch

from ldm.models.diffusion.noise import (
    PerImageNoise,
    PhiloxNoise,
    RunNoise,
    StreamPlace,
    TorchNoise,
    blocks_per_thread,
    noise_source,
    philox,
    philox_normal,
)

# The output of torch's CUDA generator for seed 0, shape 3x4.
SEED_0 = [
    [-0.92466259, -0.42534415, -2.6438457, 0.14518388],
    [-0.12086647, -0.57972564, -0.62285122, -0.32838709],
    [-1.07454231, -0.36314407, -1.67105067, 2.26550497],
]

# Known answers of the Random123 library: counter, key (low word first), output.
KNOWN_ANSWERS = [
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


def scalar_philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox-4x32-10 on Python integers, one step at a time."""
    words, keys = list(counter), list(key)
    for _ in range(10):
        first = words[0] * 0xD2511F53
        second = words[2] * 0xCD9E8D57
        words = [
            (second // 2**32) ^ words[1] ^ keys[0],
            second % 2**32,
            (first // 2**32) ^ words[3] ^ keys[1],
            first % 2**32,
        ]
        keys = [(keys[0] + 0x9E3779B9) % 2**32, (keys[1] + 0xBB67AE85) % 2**32]
    return words


def scalar_randn(seed: int, offset: int, count: int, threads: int) -> list[float]:
    """The GPU's kernel as it runs: each thread walks over its elements, four at a time."""
    running = min(count, threads)
    out = [math.nan] * count
    for thread in range(running):
        block = offset
        for start in range(thread, count, 4 * running):
            words = scalar_philox([block % 2**32, block >> 32, thread, 0], [seed % 2**32, seed >> 32])
            normals = []
            for x, y in (words[:2], words[2:]):
                radius = math.sqrt(-2 * math.log(np.float32((x + 0.5) / 2**32)))
                angle = 2 * math.pi * (y + 0.5) / 2**32
                normals += [radius * math.sin(angle), radius * math.cos(angle)]
            for i, normal in enumerate(normals):
                if start + i * running < count:
                    out[start + i * running] = normal
            block += 1
    return out


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, output):
    assert scalar_philox(counter, key) == output
    words = philox(tuple(np.array([c], np.uint64) for c in counter), key[0] + (key[1] << 32))
    assert [int(word[0]) for word in words] == output


def test_cuda_vector():
    noise = PhiloxNoise(0, "cpu").draw((3, 4))
    assert noise.dtype == torch.float32
    np.testing.assert_allclose(noise.numpy(), SEED_0, atol=1e-6, rtol=0)


@pytest.mark.parametrize("seed", [0, 42, 2**32 + 5, 2**64 - 1])
@pytest.mark.parametrize("count", [1, 31, 32, 33, 64, 127, 128, 129, 300])
def test_large_draws_follow_the_kernel(seed, count):
    threads = 32
    numbers = philox_normal(seed, 3, count, threads)
    assert numbers.dtype == np.float32
    assert numbers.shape == (count,)
    np.testing.assert_allclose(numbers, scalar_randn(seed, 3, count, threads), atol=3e-6, rtol=0)


def test_all_64_bits_of_a_seed_count():
    seeds = [2**63, 2**64 - 1, 0]
    numbers = noise_source("philox", "image", seeds, "cpu").draw((3, 5)).numpy()
    for row, seed in zip(numbers, seeds, strict=True):
        np.testing.assert_allclose(row, scalar_randn(seed, 0, 5, 5), atol=3e-6, rtol=0)
    assert len({row.tobytes() for row in numbers}) == 3


@pytest.mark.parametrize("seed", [2**32 + 5, 156680208700286, 2**63, 2**64 - 1])
def test_torch_uses_the_lower_32_bits_of_a_seed_on_the_cpu(seed):
    """So the seeds of other programs that draw there can be recorded in 32 bits."""
    whole, short = (torch.Generator().manual_seed(s) for s in (seed, seed % 2**32))
    assert torch.equal(torch.randn(4, 64, 64, generator=whole), torch.randn(4, 64, 64, generator=short))


def test_offset_beyond_32_bits():
    offset = 2**32 - 1
    numbers = philox_normal(7, offset, 48, threads=4)
    np.testing.assert_allclose(numbers, scalar_randn(7, offset, 48, threads=4), atol=3e-6, rtol=0)


def test_offset_counts_the_blocks_of_a_thread():
    assert [blocks_per_thread(n, 8) for n in (0, 1, 8, 32, 33, 64, 65)] == [0, 1, 1, 1, 2, 2, 3]


def test_empty_draw():
    assert PhiloxNoise(1, "cpu").draw((0, 4)).shape == (0, 4)


def test_negative_seed_is_its_64_bit_pattern():
    np.testing.assert_array_equal(philox_normal(-1, 0, 8), philox_normal(2**64 - 1, 0, 8))


def test_distribution():
    numbers = philox_normal(1234, 0, 1 << 20).astype(np.float64)
    error = 5 / math.sqrt(numbers.size)  # five standard errors
    assert abs(numbers.mean()) < error
    assert abs(numbers.var() - 1) < error * math.sqrt(2)
    assert abs((numbers**3).mean()) < error * math.sqrt(15)
    assert abs((numbers**4).mean() - 3) < error * math.sqrt(96)
    assert abs(np.mean(numbers[1:] * numbers[:-1])) < error
    assert np.isfinite(numbers).all()


def test_speed():
    times = []
    for _ in range(5):
        start = time.process_time()
        philox_normal(1, 0, 4 * 64 * 64)
        times.append(time.process_time() - start)
    assert min(times) < 5e-3


def torch_noise(seed):
    return TorchNoise(torch.Generator().manual_seed(seed), "cpu")


@pytest.mark.parametrize("make", [lambda: PhiloxNoise(5, "cpu", threads=16), lambda: torch_noise(5)])
def test_skip_passes_over_one_draw(make):
    drawn, skipped = make(), make()
    first = drawn.draw((2, 4, 8, 8))
    skipped.skip((2, 4, 8, 8))
    second = drawn.draw((2, 4, 8, 8))
    assert not torch.equal(first, second)
    assert torch.equal(skipped.draw((2, 4, 8, 8)), second)
    assert torch.equal(make().draw((2, 4, 8, 8)), first)


def test_per_image_noise_does_not_depend_on_the_batch():
    together = noise_source("philox", "image", [10, 11, 12], "cpu")
    alone = noise_source("philox", "batch", [11], "cpu")
    together.skip((3, 4, 8, 8))
    alone.skip((1, 4, 8, 8))
    for _ in range(2):
        assert torch.equal(together.draw((3, 4, 8, 8))[1:2], alone.draw((1, 4, 8, 8)))


def test_batch_noise_is_one_draw_of_the_first_seed():
    noise = noise_source("philox", "batch", [0, 1, 2], "cpu").draw((3, 1, 2, 2))
    np.testing.assert_allclose(noise.reshape(3, 4).numpy(), SEED_0, atol=1e-6, rtol=0)


@pytest.mark.parametrize("rng", ["cpu", "device"])
def test_torch_noise_is_torch_randn(rng):
    source = noise_source(rng, "image", [3, 4], "cpu")
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    for _ in range(2):
        expected = torch.cat([torch.randn(1, 4, 8, 8, generator=g) for g in generators])
        assert torch.equal(source.draw((2, 4, 8, 8)), expected)


def test_global_generator():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(9)
        expected = [torch.randn(2, 4) for _ in range(3)]
        torch.manual_seed(9)
        source = TorchNoise(None, "cpu")
        first = source.draw((2, 4))
        source.skip((2, 4))
        last = source.draw((2, 4))
    assert torch.equal(first, expected[0])
    assert torch.equal(last, expected[2])


def test_wrong_uses_are_refused():
    with pytest.raises(ValueError, match="2 noise streams, one an image, for a batch of 3"):
        PerImageNoise([torch_noise(1), torch_noise(2)]).draw((3, 4, 8, 8))
    with pytest.raises(ValueError, match="'xpu'"):
        noise_source("xpu", "image", [1], "cpu")
    with pytest.raises(ValueError, match="'run'"):
        noise_source("cpu", "run", [1], "cpu")
    with pytest.raises(ValueError, match="at least one seed"):
        noise_source("philox", "batch", [], "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_equals_the_gpu_itself():
    properties = torch.cuda.get_device_properties(0)
    threads = properties.multi_processor_count * (properties.max_threads_per_multi_processor // 256) * 256
    sizes = [12, 16384, 4 * 16384, threads - 1, threads, threads + 1, 4 * threads + 1, 12]
    ours = PhiloxNoise(42, "cpu", threads)
    generator = torch.Generator("cuda").manual_seed(42)
    for size in sizes:
        expected = torch.randn(size, generator=generator, device="cuda").cpu()
        # The GPU's sine is good to about 5e-7, times a radius of at most 6.7.
        torch.testing.assert_close(ours.draw((size,)), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("rng", ["philox", "cpu", "numpy"])
@pytest.mark.parametrize("fixed", [None, 3])
def test_a_place_in_the_stream_of_a_run_is_found_by_its_text(rng, fixed):
    one = (4, 8, 8)
    run = RunNoise(noise_source(rng, "batch", [7], "cpu"), fixed)
    run.skip_start((2, 4, 4, 4))
    run.draw((1, *one))
    start = run.start((2, *one))
    run.skip((2, 4, 4, 4))
    text = next(str(place) for place in run.places([1, 0]))
    place = StreamPlace.parse(text)
    assert str(place) == text and (place.row, place.size, place.entry) == (1, 2, 0)
    again = RunNoise(noise_source(rng, "batch", [7], "cpu"))
    assert torch.equal(again.enter(place, one), start[1:])
    assert torch.equal(again.draw((2, *one)), run.draw((2, *one)))
    assert again.places([1]) == [
        dataclasses.replace(place, size=1, since_start=place.since_start + Counter([(2, *one)]))
    ]
