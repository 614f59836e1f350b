"""The samplers' sources of noise: the CUDA generator's numbers on any device, or torch's generators."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal, NamedTuple, Protocol

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


Generator = Literal["philox", "cpu", "device", "numpy"]
Draws = Counter[tuple[int, ...]]  # the number of draws of each shape


class NoiseSource(Protocol):
    """A stream of standard normal numbers that is drawn in order."""

    def draw(self, shape: Sequence[int]) -> Tensor:
        """Draws the next float32 numbers in `shape` [batch, ...], on the source's device."""
        ...

    def skip(self, shape: Sequence[int]) -> None:
        """Advances the stream as a draw of `shape` would."""
        ...


class PhiloxNoise:
    """The stream of torch's CUDA generator for one seed, computed on the CPU.

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
        self.draw(shape)  # torch has no other way to skip numbers


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


class RunNoise:
    """The one stream of a run in seed mode "batch", which records its position.

    With `fixed_rows` all batches of a size start from the same noise, drawn once for that many images.
    """

    def __init__(self, source: NoiseSource, fixed_rows: int | None = None) -> None:
        self._source, self._fixed_rows = source, fixed_rows
        self._drawn: Draws = Counter()
        self._codes: dict[tuple[int, ...], tuple[Tensor, _Code]] = {}
        self._code: _Code | None = None

    def draw(self, shape: Sequence[int]) -> Tensor:
        self._drawn[tuple(shape)] += 1
        return self._source.draw(shape)

    def skip(self, shape: Sequence[int]) -> None:
        self._drawn[tuple(shape)] += 1
        self._source.skip(shape)

    def start(self, shape: Sequence[int]) -> Tensor:
        """Draws the start noise of a batch of `shape`."""
        if self._fixed_rows is None:
            self._code = _Code(Counter(self._drawn), tuple(shape))
            return self.draw(shape)
        one = tuple(shape[1:])
        if one not in self._codes:
            whole = (self._fixed_rows, *one)
            code = _Code(Counter(self._drawn), whole)
            self._codes[one] = self.draw(whole), code
        latents, self._code = self._codes[one]
        return latents[: shape[0]]

    def skip_start(self, shape: Sequence[int]) -> None:
        """Advances the stream as `start` would."""
        if self._fixed_rows is None:
            self.skip(shape)
        else:
            self.start(shape)

    def enter(self, place: StreamPlace, shape: Sequence[int]) -> Tensor:
        """Advances to the place of an image, and returns its start noise [1, *shape]."""
        self._pass(place.before_start)
        code = _Code(Counter(self._drawn), (place.rows, *shape), place.row)
        start = self.draw(code.shape)[place.row : place.row + 1]
        self._code = code
        self._pass(place.since_start)
        return start

    def places(self, rows: Sequence[int]) -> list[StreamPlace]:
        """Returns the places of the images of the batch to be denoised; they are these rows of its start noise."""
        code = self._code
        if code is None:
            return []
        since = self._drawn - code.drawn_before - Counter([code.shape])
        chosen = rows if code.row is None else [code.row] * len(rows)
        return [
            StreamPlace(code.drawn_before, code.shape[0], row, since, len(rows), entry)
            for entry, row in enumerate(chosen)
        ]

    def _pass(self, draws: Draws) -> None:
        for shape, times in draws.items():
            for _ in range(times):
                self.skip(shape)


class _Code(NamedTuple):
    """The draws before some start noise, its shape, and the row that is used if only one is."""

    drawn_before: Draws
    shape: tuple[int, ...]
    row: int | None = None


_DRAWS = r"-|[0-9]+(?:x[0-9]+)*\*[0-9]+(?: [0-9]+(?:x[0-9]+)*\*[0-9]+)*"
_PLACE = re.compile(rf"after ({_DRAWS}) row ([0-9]+) of ([0-9]+) after ({_DRAWS}) entry ([0-9]+) of ([0-9]+)")
MAX_ROWS = 1_000  # images of one draw
MAX_DRAW = 2**28  # numbers of one draw
MAX_DRAWN = 2 * 10**10  # numbers that are drawn before one image: minutes with torch's generators


@dataclass(frozen=True)
class StreamPlace:
    """The place of an image's noise in the stream of its run; as text, an entry of its file.

    Its start noise is `row` of a draw for `rows` images, after `before_start`. Its batch of `size` images, of which
    it is number `entry`, was denoised after the further draws `since_start`. Draws are counted by their shape: where
    in a stream one is depends on how many of which shape there were before, not on their order.
    """

    before_start: Draws
    rows: int
    row: int
    since_start: Draws
    size: int
    entry: int

    def __str__(self) -> str:
        return (
            f"after {_draws_text(self.before_start)} row {self.row} of {self.rows} "
            f"after {_draws_text(self.since_start)} entry {self.entry} of {self.size}"
        )

    @classmethod
    def parse(cls, text: str) -> StreamPlace:
        """Parses the text of a place. Raises ValueError for any other text and for too many numbers to redraw."""
        match = _PLACE.fullmatch(text)
        if match is None:
            raise ValueError("it is not a place in a stream of noise")
        row, rows, entry, size = (int(match[i][:9]) for i in (2, 3, 5, 6))
        before, since = _read_draws(match[1]), _read_draws(match[4])
        if not (row < rows <= MAX_ROWS and entry < size <= MAX_ROWS):
            raise ValueError(f"it is of a batch of more than {MAX_ROWS} images, or not in it")
        draws = [*before.items(), *since.items()]
        if any(prod(shape) > MAX_DRAW for shape, _ in draws) or (
            sum(prod(shape) * times for shape, times in draws) > MAX_DRAWN
        ):
            raise ValueError(f"it comes after more than {MAX_DRAWN:.0e} numbers, too many to draw them again")
        return cls(before, rows, row, since, size, entry)


def _draws_text(draws: Draws) -> str:
    return " ".join(f"{'x'.join(map(str, shape))}*{times}" for shape, times in draws.items()) or "-"


def _read_draws(text: str) -> Draws:
    draws: Draws = Counter()
    for part in text.split() if text != "-" else []:
        shape, times = part.split("*")
        draws[tuple(int(side[:9]) for side in shape.split("x"))] += int(times[:12])
    return draws


class RepeatedNoise:
    """A source that repeats the noise of one image for the whole batch."""

    def __init__(self, source: NoiseSource) -> None:
        self.source = source

    def draw(self, shape: Sequence[int]) -> Tensor:
        return self.source.draw((1, *shape[1:])).expand(tuple(shape))

    def skip(self, shape: Sequence[int]) -> None:
        self.source.skip((1, *shape[1:]))


class SkippingNoise:
    """Skips the draws from a source, and returns zeros on the CPU instead."""

    def __init__(self, source: NoiseSource) -> None:
        self.skip = source.skip

    def draw(self, shape: Sequence[int]) -> Tensor:
        self.skip(shape)
        return torch.zeros(tuple(shape))


def noise_source(
    rng: Generator,
    seed_mode: Literal["image", "batch"],
    seeds: Sequence[int],
    device: torch.device | str,
) -> NoiseSource:
    """Returns the noise source of a batch whose images have `seeds`.

    `rng`: "philox" (the CUDA generator's numbers, anywhere), "cpu" or "device" (torch's generator there), or
    "numpy" (its legacy generator).
    `seed_mode`: "image" gives every image the stream of its seed; "batch" gives the batch the stream of the
    first seed, in the order of the original scripts (keep the source for all batches of a run).
    """
    if not seeds:
        raise ValueError("noise needs at least one seed")
    if seed_mode == "image":
        return PerImageNoise([stream(rng, seed, device) for seed in seeds])
    if seed_mode == "batch":
        return stream(rng, seeds[0], device)
    raise ValueError(f"seed mode {seed_mode!r} is neither 'image' nor 'batch'")


def stream(rng: Generator, seed: int, device: torch.device | str) -> NoiseSource:
    """Returns the stream of one seed; `rng` is as in `noise_source`."""
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
    """Returns the numbers of `torch.randn(count, device="cuda")` to some 1e-6, as float32 [count].

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
    """Returns how far one draw of `count` numbers advances the generator's offset, in Philox blocks."""
    return -(-count // (UNROLL * threads))


def philox(counter: tuple[Words, Words, Words, Words], key: int) -> tuple[Words, Words, Words, Words]:
    """Computes Philox-4x32-10 (Salmon et al. 2011): four random 32-bit words for each counter, by a 64-bit key."""
    x0, x1, x2, x3 = counter
    low, high = np.uint64(key & 0xFFFFFFFF), np.uint64(key >> 32 & 0xFFFFFFFF)
    for _ in range(10):
        a, b = x0 * np.uint64(0xD2511F53), x2 * np.uint64(0xCD9E8D57)
        x0, x1, x2, x3 = b >> _32 ^ x1 ^ low, b & _WORD, a >> _32 ^ x3 ^ high, a & _WORD
        low, high = low + np.uint64(0x9E3779B9) & _WORD, high + np.uint64(0xBB67AE85) & _WORD
    return x0, x1, x2, x3


def _normal(words: tuple[Words, Words, Words, Words], i: int) -> npt.NDArray[np.float32]:
    """Returns the i-th of the four normal numbers of a Philox block (Box and Muller's transform).

    The uniform numbers are rounded to float32 where the GPU rounds them; the rest is computed in float64, so
    that differences between processors are rounded away.
    """
    x, y = (words[2 * (i // 2) + j].astype(np.float32).astype(np.float64) for j in (0, 1))
    turn = float(np.float32(2 * np.pi))
    uniform = ((x + 0.5) * 2.0**-32).astype(np.float32).astype(np.float64)
    angle = ((y + 0.5) * (turn * 2.0**-32)).astype(np.float32).astype(np.float64)
    wave = np.cos(angle) if i % 2 else np.sin(angle)
    return (np.sqrt(-2 * np.log(uniform)) * wave).astype(np.float32)
