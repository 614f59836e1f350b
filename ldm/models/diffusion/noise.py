"""Where samplers get their noise: the CUDA generator's numbers on any device, or torch's own generators."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

# Threads that an A100 keeps in flight: 108 multiprocessors of 2048. A draw of more numbers than that depends
# on the GPU; smaller ones are the same on every GPU.
A100_THREADS = 108 * 2048
UNROLL = 4  # normal numbers that one thread makes from one Philox block

Words = npt.NDArray[np.uint64]  # 32-bit words, kept in 64 bits so that products are whole
_32, _WORD = np.uint64(32), np.uint64(0xFFFFFFFF)


class NoiseSource(Protocol):
    """A stream of standard normal numbers that is drawn in order."""

    def draw(self, shape: Sequence[int]) -> Tensor:
        """The next float32 numbers in `shape` [batch, ...], on the source's device."""
        ...

    def skip(self, shape: Sequence[int]) -> None:
        """Leaves the stream as a draw of `shape` would."""
        ...


class PhiloxNoise:
    """The stream of one seed that torch's CUDA generator gives, computed on the CPU.

    `threads` is the number of threads that the imitated GPU runs at once; see `philox_normal`.
    """

    def __init__(self, seed: int, device: torch.device | str, threads: int = A100_THREADS) -> None:
        self.seed = seed
        self.device = torch.device(device)
        self.threads = threads
        self.offset = 0

    def draw(self, shape: Sequence[int]) -> Tensor:
        numbers = philox_normal(self.seed, self.offset, prod(shape), self.threads)
        self.skip(shape)
        return torch.from_numpy(numbers).reshape(tuple(shape)).to(self.device)

    def skip(self, shape: Sequence[int]) -> None:
        self.offset += blocks_per_thread(prod(shape), self.threads)


class TorchNoise:
    """The stream of a torch generator, or of the device's global one (`generator` None).

    Numbers are drawn where the generator lives and then moved to `device`.
    """

    def __init__(self, generator: torch.Generator | None, device: torch.device | str) -> None:
        self.generator = generator
        self.device = torch.device(device)

    def draw(self, shape: Sequence[int]) -> Tensor:
        origin = self.device if self.generator is None else self.generator.device
        return torch.randn(tuple(shape), generator=self.generator, device=origin).to(self.device)

    def skip(self, shape: Sequence[int]) -> None:
        self.draw(shape)  # torch has no other way to pass numbers over


class NumpyNoise:
    """The stream of NumPy's legacy generator, from which the published inpainting app draws its start noise."""

    def __init__(self, seed: int, device: torch.device | str) -> None:
        self.generator = np.random.RandomState(seed)
        self.device = torch.device(device)

    def draw(self, shape: Sequence[int]) -> Tensor:
        return torch.from_numpy(self.generator.randn(*shape)).float().to(self.device)

    def skip(self, shape: Sequence[int]) -> None:
        self.draw(shape)


class PerImageNoise:
    """One source for each image of a batch, so that an image's noise does not depend on its neighbours."""

    def __init__(self, sources: Sequence[NoiseSource]) -> None:
        self.sources = list(sources)

    def draw(self, shape: Sequence[int]) -> Tensor:
        one = self._one(shape)
        return torch.cat([source.draw(one) for source in self.sources])

    def skip(self, shape: Sequence[int]) -> None:
        one = self._one(shape)
        for source in self.sources:
            source.skip(one)

    def _one(self, shape: Sequence[int]) -> tuple[int, ...]:
        if shape[0] != len(self.sources):
            raise ValueError(f"{len(self.sources)} noise streams, one an image, for a batch of {shape[0]}")
        return (1, *shape[1:])


class RepeatedNoise:
    """A source whose noise for one image serves the whole batch."""

    def __init__(self, source: NoiseSource) -> None:
        self.source = source

    def draw(self, shape: Sequence[int]) -> Tensor:
        return self.source.draw((1, *shape[1:])).expand(tuple(shape))

    def skip(self, shape: Sequence[int]) -> None:
        self.source.skip((1, *shape[1:]))


def noise_source(
    rng: Literal["philox", "cpu", "device", "numpy"],
    seed_mode: Literal["image", "batch"],
    seeds: Sequence[int],
    device: torch.device | str,
) -> NoiseSource:
    """The noise of a batch whose images have `seeds`.

    `rng`: "philox" (the CUDA generator's numbers, anywhere), "cpu" or "device" (torch's generator there), or
    "numpy" (its legacy generator).
    `seed_mode`: "image" gives every image the stream of its seed; "batch" gives the batch the stream of the
    first seed, in the order of the original scripts (keep the source for all batches of a run).
    """
    if not seeds:
        raise ValueError("noise needs at least one seed")
    if seed_mode == "image":
        return PerImageNoise([_stream(rng, seed, device) for seed in seeds])
    if seed_mode == "batch":
        return _stream(rng, seeds[0], device)
    raise ValueError(f"seed mode {seed_mode!r} is neither 'image' nor 'batch'")


def _stream(rng: str, seed: int, device: torch.device | str) -> NoiseSource:
    if rng == "philox":
        return PhiloxNoise(seed, device)
    if rng == "cpu":
        return TorchNoise(torch.Generator("cpu").manual_seed(seed), device)
    if rng == "device":
        return TorchNoise(torch.Generator(device).manual_seed(seed), device)
    if rng == "numpy":
        return NumpyNoise(seed, device)
    raise ValueError(f"noise generator {rng!r} is none of 'philox', 'cpu', 'device', 'numpy'")


def philox_normal(seed: int, offset: int, count: int, threads: int = A100_THREADS) -> npt.NDArray[np.float32]:
    """The `count` numbers that `torch.randn(count, device="cuda")` gives, to some 1e-6, as float32 [count].

    `seed` is the generator's 64-bit seed, `offset` the Philox blocks that every thread has used in earlier
    draws (the sum of their `blocks_per_thread`). Thread j of T uses the blocks with counter
    (offset + k, 0, j, 0), k = 0, 1, ...; each gives four normal numbers, the elements (4 k + i) T + j for
    i = 0..3. The GPU starts a thread for each number, but no more than `threads`.
    """
    if count == 0:
        return np.empty(0, np.float32)
    running = min(count, threads)
    block = np.uint64(offset) + np.arange(blocks_per_thread(count, threads), dtype=np.uint64)[:, None]
    thread = np.arange(running, dtype=np.uint64)
    words = philox((block & _WORD, block >> _32, thread, np.zeros_like(thread)), seed)
    used = min(UNROLL, -(-count // running))
    normals = np.stack([_normal(words, i) for i in range(used)], axis=1)  # [blocks, used, threads]
    return normals.reshape(-1)[:count]


def blocks_per_thread(count: int, threads: int) -> int:
    """How far one draw of `count` numbers moves the generator's offset on, in Philox blocks."""
    return -(-count // (UNROLL * threads))


def philox(counter: tuple[Words, Words, Words, Words], key: int) -> tuple[Words, Words, Words, Words]:
    """Philox-4x32-10 (Salmon et al. 2011): four random 32-bit words for each counter, by a 64-bit key."""
    x0, x1, x2, x3 = counter
    low, high = np.uint64(key & 0xFFFFFFFF), np.uint64(key >> 32 & 0xFFFFFFFF)
    for _ in range(10):
        a, b = x0 * np.uint64(0xD2511F53), x2 * np.uint64(0xCD9E8D57)
        x0, x1, x2, x3 = b >> _32 ^ x1 ^ low, b & _WORD, a >> _32 ^ x3 ^ high, a & _WORD
        low, high = low + np.uint64(0x9E3779B9) & _WORD, high + np.uint64(0xBB67AE85) & _WORD
    return x0, x1, x2, x3


def _normal(words: tuple[Words, Words, Words, Words], i: int) -> npt.NDArray[np.float32]:
    """The i-th of the four normal numbers of a Philox block (Box and Muller's transform).

    The uniform numbers are rounded to float32 where the GPU rounds them; the rest is computed in float64, so
    that what processors differ in is rounded away.
    """
    x, y = (words[2 * (i // 2) + j].astype(np.float32).astype(np.float64) for j in (0, 1))
    turn = float(np.float32(2 * np.pi))
    uniform = ((x + 0.5) * 2.0**-32).astype(np.float32).astype(np.float64)
    angle = ((y + 0.5) * (turn * 2.0**-32)).astype(np.float32).astype(np.float64)
    wave = np.cos(angle) if i % 2 else np.sin(angle)
    return (np.sqrt(-2 * np.log(uniform)) * wave).astype(np.float32)
