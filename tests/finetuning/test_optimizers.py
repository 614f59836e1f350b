"""The optimisers that need less memory than AdamW: how near to its steps 8 bits come, and what each keeps."""

import pytest
import torch

from ldm.finetuning.module import make_optimizer
from ldm.finetuning.settings import make_settings
from tests.support.golden_data import relative_error


def moved(name):
    """The change of a weight in 20 steps of an optimiser, and the bytes of what it keeps of the weight."""
    generator = torch.Generator().manual_seed(0)
    start, target = torch.randn(2, 128, 64, generator=generator)
    weight = torch.nn.Parameter(start.clone())
    settings = make_settings("lora", {"optimizer": name, "learning_rate": 1e-2})
    optimizer = make_optimizer([{"params": [weight], "lr": 1e-2}], settings)
    for _ in range(20):
        optimizer.zero_grad()
        (weight - target).square().mean().backward()
        optimizer.step()
    kept = [value for value in optimizer.state[weight].values() if isinstance(value, torch.Tensor)]
    return weight.detach() - start, sum(value.nbytes for value in kept), target - start


def test_8_bits_are_near_to_adamw_and_take_a_third():
    pytest.importorskip("bitsandbytes")
    exact, whole, _ = moved("adamw")
    change, kept, _ = moved("adamw8bit")
    assert relative_error(change, exact) < 0.05
    assert kept < whole / 3


def test_adafactor_goes_to_the_target_and_keeps_rows_and_columns():
    change, kept, way = moved("adafactor")
    assert kept < 4 * (128 + 64) + 16
    assert torch.nn.functional.cosine_similarity(change.flatten(), way.flatten(), dim=0) > 0.9
