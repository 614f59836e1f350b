"""Where a model runs and in which precision."""

from __future__ import annotations

import logging
import re
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from ldm.util import InputError, printable

logger = logging.getLogger(__name__)


def resolve_device(name: str) -> torch.device:
    """The device for `auto`, `cpu`, `cuda`, `cuda:N` or `mps`; `auto` takes the first GPU there is.

    A device that is not there is an `InputError` if it was asked for by name.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        if torch.backends.mps.is_available():
            return torch.device("mps")
        logger.info("no GPU found; using the CPU")
        return torch.device("cpu")
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        raise InputError(f"unknown device {printable(name)!r}; it is auto, cpu, cuda, cuda:N or mps")
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
    """A name for reports, and the dtype that matrix products and convolutions are cast to (None: float32)."""

    name: str
    autocast: torch.dtype | None

    def context(self, device: torch.device) -> AbstractContextManager:
        """What model calls run in."""
        return torch.autocast(device.type, self.autocast) if self.autocast else nullcontext()


FULL = Precision("full", None)


def resolve_precision(requested: str, device: torch.device) -> Precision:
    """`full` is float32; `autocast` is fp16 on a GPU, and bf16 on a CPU that has instructions for it."""
    if requested == "full":
        # convolutions on a GPU would round their inputs to 10 bits otherwise
        torch.backends.cudnn.allow_tf32 = False
        return FULL
    if requested != "autocast":
        raise InputError(f"unknown precision {printable(requested)!r}; it is full or autocast")
    if device.type != "cpu":
        return Precision("autocast fp16", torch.float16)
    if torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported():
        return Precision("autocast bf16", torch.bfloat16)
    logger.info("this CPU has no bf16 instructions; using full precision")
    return FULL
