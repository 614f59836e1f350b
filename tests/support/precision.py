"""The CPU features that tests of bf16 and int8 need."""

from __future__ import annotations

import pytest
import torch

from ldm.runtime import int8, kernels

needs_bf16_kernels = pytest.mark.skipif(
    not kernels.can_pack(torch.bfloat16), reason="this CPU has no kernels for bf16"
)
needs_int8_kernels = pytest.mark.skipif(bool(int8.unsupported()), reason=int8.unsupported())
EACH_PACKED = [torch.float32, pytest.param(torch.bfloat16, marks=needs_bf16_kernels)]
