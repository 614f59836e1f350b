"""The CPU features that tests of bf16 need."""

from __future__ import annotations

import pytest
import torch

from ldm.runtime import kernels

needs_bf16_kernels = pytest.mark.skipif(
    not kernels.can_pack(torch.bfloat16), reason="this CPU has no kernels for bf16"
)
EACH_PACKED = [torch.float32, pytest.param(torch.bfloat16, marks=needs_bf16_kernels)]
