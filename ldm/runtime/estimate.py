"""Estimates the cost of a run: the work of its networks, counted without weights, and the pace of this machine.

The work is that of the networks as written in `ldm/modules`: operations that `fast.py` shares or fuses are counted in
full, so an estimate errs on the long side. Attention counts as one operation that keeps no scores.
"""

from __future__ import annotations

import statistics
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ldm.models.diffusion.ddpm import HybridDiffusion, LatentDiffusion, LatentInpaintDiffusion
from ldm.models.keys import FIRST_STAGE_PREFIX
from ldm.modules.diffusionmodules.controlnet import ControlNet
from ldm.runtime import kernels
from ldm.runtime.device import Precision
from ldm.runtime.fast import accelerate
from ldm.runtime.packing import Packer
from ldm.runtime.prepare import halved, narrow_layers, rounded_layers, use_int8
from ldm.runtime.shortcuts import CachedBlocks
from ldm.util import is_list

TRIAL, MOST_TRIALS = 0.1, 50  # seconds of trials of an operation, and their greatest number
CHANNELS, HEADS = 320, 8  # sizes of the trials: those of v1's finest level

_aten = torch.ops.aten
_ENCODER = f"{FIRST_STAGE_PREFIX}encoder.", f"{FIRST_STAGE_PREFIX}quant_conv."
_KINDS = {
    _aten.convolution: "convolution",
    **dict.fromkeys((_aten.mm, _aten.addmm, _aten.bmm, _aten.baddbmm), "matrix"),
}


# --- work -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Work:
    """The operations and memory of a call.

    `products` are floating-point operations by kind ("convolution", "matrix", "attention"), two for each
    multiplication and its addition. `written` counts the numbers that all other operations write, `operations`
    those that write any, products among them, and `alive` the numbers that exist at a time at most, weights apart.
    """

    products: Mapping[str, int]
    written: int
    operations: int
    alive: int

    def scaled(self, ratio: float) -> Work:
        """Returns the work for `ratio` times the pixels: attention grows with their square."""
        products = {
            kind: round(count * ratio ** (2 if kind == "attention" else 1))
            for kind, count in self.products.items()
        }
        return Work(products, round(self.written * ratio), self.operations, round(self.alive * ratio))


def count_work(call: Callable[[], object]) -> Work:
    """Counts the work of a call, whose tensors may be on the meta device, where nothing is computed."""
    with torch.inference_mode(), _Tally() as tally:
        call()
    return Work(dict(tally.products), tally.written, tally.operations, tally.most)


class _Tally(TorchDispatchMode):
    """Intercepts each operation on tensors and adds up its work."""

    def __init__(self) -> None:
        super().__init__()
        self.products: Counter[str] = Counter()
        self.written = self.operations = self.alive = self.most = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is _aten.scaled_dot_product_attention.default:  # on meta its scores would be held
            return self._attend(*args[:3])
        with self:
            out = func.decompose(*args, **kwargs)
        if out is NotImplemented:
            self._known.update(part.untyped_storage() for part in _tensors(args))
            out = func(*args, **kwargs)
            self._add(func.overloadpacket, args, kwargs, out)
        return out

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        self.products["attention"] += 2 * (q.numel() + out.numel()) * k.shape[-2]
        self._keep(out)
        self.operations += 1
        return out

    def _add(self, operation: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        new = sum(map(self._keep, _tensors([out])))
        self.operations += new > 0
        if kind := _KINDS.get(operation):
            self.products[kind] += flop_registry[operation](*args, **kwargs, out_val=out)
        else:
            self.written += new

    def _keep(self, result: Tensor) -> int:
        """Returns how many numbers a result adds to memory: none if it is a view."""
        storage, size = result.untyped_storage(), result.numel()
        if storage in self._known:
            return 0
        self._known.add(storage)
        self.alive += size
        self.most = max(self.most, self.alive)
        weakref.finalize(storage, self._drop, size)
        return size

    def _drop(self, size: int) -> None:
        self.alive -= size


def _tensors(values: Iterable[object]) -> Iterator[Tensor]:
    """Yields the tensors among values and lists of values."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif is_list(value):
            yield from _tensors(value)


class NetworkWork:
    """The work of a model's networks for one sample, counted on the meta device; sizes are in pixels.

    `predict` is one call of the U-Net, `control` one of a control network, `decode` latents to an image, `encode` an
    image to the distribution of its latents, `read` one prompt. Everything but the number of operations grows with
    the number of samples.
    """

    def __init__(self, model: LatentDiffusion) -> None:
        self._model = model.eval()
        self.predict, self.decode, self.encode = map(_BySize, (self._predict, self._decode, self._encode))
        self.control = _BySize(self._control)

    @cached_property
    def read(self) -> Work:
        return count_work(lambda: self._model.get_learned_conditioning([""]))

    def reuse(self, branch: int, height: int, width: int) -> Work:
        """Returns the work of a call of the U-Net that runs its outermost blocks only, see `CachedBlocks`."""
        call, network = self._call(height, width), self._model.model.diffusion_model
        with torch.inference_mode(), CachedBlocks(network, {0}, branch) as cached:
            call()
            cached.next_step()
            return count_work(call)

    def _predict(self, height: int, width: int) -> Work:
        return count_work(self._call(height, width))

    def _call(self, height: int, width: int) -> Callable[[], Tensor]:
        x, cond = self._latents(height, width), self._context
        if isinstance(self._model, HybridDiffusion):
            masks = [x[:, :1]] if isinstance(self._model, LatentInpaintDiffusion) else []
            cond = self._model.hybrid_conditioning(cond, *masks, x)
        return lambda: self._model.apply_model(x, torch.zeros(1, device="meta"), cond)

    def _control(self, height: int, width: int) -> Work:
        x, network, context = self._latents(height, width), self._control_network, self._context
        features = x.new_empty(1, network.model_channels, *x.shape[2:])
        return count_work(lambda: network.add(x, features, torch.zeros(1, device="meta"), context))

    @cached_property
    def _control_network(self) -> ControlNet:
        """A control network for the model's U-Net, on the meta device."""
        settings = self._model.model.diffusion_model.settings
        own: dict[str, Any] = {"in_channels": self._model.channels, "time_cond_proj_dim": None}
        with torch.device("meta"):
            return ControlNet(**{**settings, **own}).eval()

    def control_bytes(self, precision: Precision) -> int:
        """Returns the bytes of a control network's weights as run in `precision` on a CPU, see `prepare_control`."""
        network = self._control_network
        narrow = {id(layer.weight): precision.dtype.itemsize for layer in narrow_layers(network)}
        if precision.int8:
            narrow |= {id(layer.weight): 1 for layer in rounded_layers(network)}
        return sum(weight.numel() * narrow.get(id(weight), 4) for weight in network.parameters())

    def _decode(self, height: int, width: int) -> Work:
        z = self._latents(height, width)
        return count_work(lambda: self._model.decode_first_stage(z))

    def _encode(self, height: int, width: int) -> Work:
        x = torch.zeros(1, 3, height, width, device="meta")
        return count_work(lambda: self._model.encode_first_stage(x))

    @cached_property
    def _context(self) -> Tensor:
        with torch.inference_mode():
            return self._model.get_learned_conditioning([""])

    def _latents(self, height: int, width: int) -> Tensor:
        factor = self._model.first_stage_model.downsampling
        return torch.zeros(1, self._model.channels, height // factor, width // factor, device="meta")


class _BySize:
    """Work by height and width: counted for the first size requested, in proportion for others."""

    def __init__(self, count: Callable[[int, int], Work]) -> None:
        self._count = count
        self._counted: tuple[int, Work] | None = None

    def __call__(self, height: int, width: int) -> Work:
        if self._counted is None:
            self._counted = height * width, self._count(height, width)
        pixels, work = self._counted
        return work.scaled(height * width / pixels)


# --- pace -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds that a machine takes for one operation of a product of each kind, to write a number, and to launch."""

    product: Mapping[str, float]
    number: float
    operation: float

    def seconds(self, work: Work, samples: int = 1) -> float:
        """Returns the seconds of a call with this work for each of its samples."""
        products = sum(self.product[kind] * count for kind, count in work.products.items())
        return samples * (products + self.number * work.written) + self.operation * work.operations


def measure_pace(device: torch.device, precision: Precision) -> Pace:
    """Measures the pace of a device in a precision with a few of the runtime's operations, in half a second.

    On a GPU they are larger, and the time to launch one is the time that the CPU takes to queue it.
    """
    side, dtype = 32 if device.type == "cpu" else 128, precision.dtype
    with torch.random.fork_rng(devices=[]):
        layers = nn.ModuleDict(
            {
                "convolution": nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1),
                "matrix": nn.Linear(CHANNELS, 4 * CHANNELS),
                "norm": nn.GroupNorm(32, CHANNELS),
                "tiny": nn.Linear(8, 8),
            }
        )
        x = torch.randn(2, CHANNELS, side, side).to(device, dtype).to(memory_format=torch.channels_last)
    attend = _prepare(layers, device, precision)
    tokens, tiny = x.flatten(2).transpose(1, 2).contiguous(), x[0, :1, :1, :8]
    multiplied = 2 * x.numel() * CHANNELS

    def took(call: Callable[[], object]) -> float:
        return _seconds(call, device)

    with torch.inference_mode():
        return Pace(
            {
                "convolution": took(lambda: layers["convolution"](x)) / (9 * multiplied),
                "matrix": took(lambda: layers["matrix"](tokens)) / (4 * multiplied),
                "attention": took(lambda: attend(tokens, tokens, tokens, HEADS)) / (4 * x.numel() * side**2),
            },
            took(lambda: kernels.norm_silu(layers["norm"], x)) / (2 * x.numel()),
            took(lambda: [layers["tiny"](tiny) for _ in range(100)]) / 100,
        )


def _prepare(
    layers: nn.ModuleDict, device: torch.device, precision: Precision
) -> Callable[[Tensor, Tensor, Tensor, int], Tensor]:
    """Sets up layers as `prepare` does for those of a model, with its attention."""
    dtype = precision.dtype
    if device.type == "cpu" and kernels.can_pack(dtype):
        accelerate(layers, Packer(dtype, lambda weight: None))
        if precision.int8:
            use_int8([layers["convolution"], layers["matrix"]])
        return kernels.attend
    layers.to(device, dtype)
    return _attend


def _attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    q, k, v = (torch.unflatten(y, -1, (heads, -1)).transpose(1, 2) for y in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v)


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """Returns the seconds of a call: the median of as many as fit into a trial, after two warm-up calls."""

    def once() -> float:
        start = time.perf_counter()
        call()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter() - start

    once()
    count = int(TRIAL / max(once(), TRIAL / MOST_TRIALS))
    return statistics.median(once() for _ in range(max(count, 1)))


# --- weights ----------------------------------------------------------------------------------------------------


def weight_bytes(model: LatentDiffusion, precision: Precision, encodes: bool = True) -> Mapping[str, int]:
    """Returns the bytes of each network's weights as run in `precision` on a CPU, including those kept in float32.

    Those of the autoencoder's encoder count only if it `encodes`: unused weights stay in their file.
    """
    narrow = dict.fromkeys(halved(model), precision.dtype.itemsize)
    if precision.int8:
        rounded = {id(layer.weight) for layer in rounded_layers(model.model.diffusion_model)}
        narrow |= {key: 1 for key, weight in model.named_parameters() if id(weight) in rounded}
    sizes: Counter[str] = Counter()
    for key, weight in model.named_parameters():
        if encodes or not key.startswith(_ENCODER):
            sizes[key.partition(".")[0]] += weight.numel() * narrow.get(key, 4)
    return sizes
