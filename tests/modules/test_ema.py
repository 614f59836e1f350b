"""The moving average against its closed form."""

import pytest
import torch
from torch import nn

from ldm.modules.ema import LitEma


def model_with(value):
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, value)
    return model


def test_constant_decay_is_a_geometric_sum():
    model = model_with(0.0)
    ema = LitEma(model, decay=0.9, use_num_upates=False)
    nn.init.constant_(model.weight, 1.0)
    for _ in range(20):
        ema(model)
    assert float(ema.weight) == pytest.approx(1 - 0.9**20, rel=1e-5)


def test_decay_warms_up():
    model = model_with(0.0)
    ema = LitEma(model, decay=0.9999)
    nn.init.constant_(model.weight, 1.0)
    expected = 0.0
    for n in range(1, 6):
        ema(model)
        decay = (1 + n) / (10 + n)
        expected = decay * expected + (1 - decay)
    assert float(ema.weight) == pytest.approx(expected, rel=1e-5)


def test_store_copy_restore():
    model = model_with(3.0)
    ema = LitEma(model_with(5.0), decay=0.5)
    ema.store(model.parameters())
    ema.copy_to(model)
    assert float(model.weight.detach()) == 5.0
    ema.restore(model.parameters())
    assert float(model.weight.detach()) == 3.0


def test_frozen_parameters_are_left_out():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    assert {name for name, _ in LitEma(model).named_buffers()} == {"decay", "num_updates", "1weight", "1bias"}


@pytest.mark.parametrize("decay", [-0.1, 1.5])
def test_impossible_decay(decay):
    with pytest.raises(ValueError, match=str(decay)):
        LitEma(nn.Linear(1, 1), decay=decay)


def test_ema_scope_swaps_and_restores(tiny):
    before = tiny.model.diffusion_model.out[2].weight.clone()
    with tiny.ema_scope():
        pass
    assert torch.equal(before, tiny.model.diffusion_model.out[2].weight)
