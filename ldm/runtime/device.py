"""Selects device and precision."""

from __future__ import annotations

import logging
import re
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from ldm.runtime import int8
from ldm.runtime.kernels import fast_bf16
from ldm.util import InputError, need, printable

logger = logging.getLogger(__name__)


def resolve_device(name: str) -> torch.device:
    """Returns the device for `auto`, `cpu`, `cuda`, `cuda:N` or `mps`; `auto` is the first GPU, if there is one.

    Raises `InputError` if a device was requested by name and is not available.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        if torch.backends.mps.is_available():
            return torch.device("mps")
        logger.info("no GPU found; using the CPU")
        return torch.device("cpu")
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        raise InputError(f"unknown device {printable(name)!r}; choose auto, cpu, cuda, cuda:N or mps")
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise InputError(
                f"device {name} is not available: torch sees {count} CUDA devices; try --device auto"
            )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError("device mps is not available on this machine; try --device auto")
    return device


@dataclass(frozen=True, slots=True)
class Precision:
    """The dtype of the networks' weights and activations, and its name for reports.

    With `int8` the layers that `ldm.runtime.prepare.rounded_layers` names multiply 8-bit numbers. The schedule, the
    sampler's arithmetic, guidance and the statistics of norms are float32 in any case.
    """

    name: str
    dtype: torch.dtype
    int8: bool = False

    @property
    def beside(self) -> Precision:
        """The precision of the networks that `int8` leaves as they are."""
        return next(each for each in (FULL, BF16, FP16) if each.dtype == self.dtype)

    def context(self, device: torch.device) -> AbstractContextManager[object]:
        """Returns the context for model calls: on a CPU, it casts in layers of other packages."""
        half_on_cpu = device.type == "cpu" and self.dtype != torch.float32
        return torch.autocast("cpu", self.dtype) if half_on_cpu else nullcontext()


FULL = Precision("full", torch.float32)
BF16 = Precision("bf16", torch.bfloat16)
FP16 = Precision("fp16", torch.float16)


def resolve_precision(requested: str, device: torch.device) -> Precision:
    """Resolves a name: `full` is float32; `autocast` is fp16 on a GPU, and bf16 on a CPU with instructions for it.

    `bf16` and `fp16` are themselves; fp16 on a CPU is an `InputError`, as it would take hours. `int8` is for
    CPUs with instructions for it; the other layers run as with `autocast`.
    """
    if requested == "int8":
        reason = f"it is for CPUs, not {device.type}" if device.type != "cpu" else int8.unsupported()
        need(not reason, f"--precision int8 cannot run here: {reason}; use autocast")
        return Precision("int8", (BF16 if fast_bf16() else FULL).dtype, int8=True)
    if requested == "full":
        # convolutions on a GPU would round their inputs to 10 bits otherwise
        torch.backends.cudnn.allow_tf32 = False
        return FULL
    if requested == "bf16":
        if device.type == "cpu" and not fast_bf16():
            logger.warning("this CPU has no bf16 instructions, so bf16 is slow; --precision full is faster")
        return BF16
    if requested not in ("autocast", "fp16"):
        raise InputError(
            f"unknown precision {printable(requested)!r}; choose full, autocast, bf16, fp16 or int8"
        )
    if device.type != "cpu":
        return FP16
    if requested == "fp16":
        raise InputError(
            "--precision fp16 needs a GPU: a CPU has no instructions for it; use autocast or full"
        )
    if fast_bf16():
        return BF16
    logger.info("this CPU has no bf16 instructions; using full precision")
    return FULL


@contextmanager
def widened(*networks: nn.Module) -> Generator[None]:
    """Holds networks in half precision as float32, which is exact, and restores their dtype on exit."""
    networks = tuple(network for network in networks if any(True for _ in network.parameters()))
    dtypes = [next(network.parameters()).dtype for network in networks]
    for network in networks:
        network.float()
    try:
        yield
    finally:
        for network, dtype in zip(networks, dtypes, strict=True):
            network.to(dtype)
