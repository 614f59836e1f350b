"""Numbered batches and progress of a training run."""

import time
from itertools import islice

import pytest
import pytorch_lightning as pl
import torch

from ldm.training.runs import Batches, Optimisation, RunSettings, fit, last_state, make_trainer
from ldm.util import InputError


def numbered_batch(number, rng):
    return number, float(rng.random())


def test_a_batch_depends_on_its_number_alone():
    whole = list(islice(Batches(numbered_batch, seed=3), 6))
    assert [number for number, _ in whole] == [0, 1, 2, 3, 4, 5]
    assert len({value for _, value in whole}) == 6
    assert list(islice(Batches(numbered_batch, seed=3, first=4), 2)) == whole[4:]
    assert list(islice(Batches(numbered_batch, seed=4), 6)) != whole


def test_workers_keep_the_order():
    alone = list(islice(Batches(numbered_batch, seed=1), 5))
    shared = [
        (int(number), float(value)) for number, value in islice(Batches(numbered_batch, seed=1).loader(2), 5)
    ]
    assert shared == alone


def test_the_rate_rises_and_falls():
    multiplier = Optimisation(1e-3, steps=100, warm_up_steps=10, f_min=0.1).multiplier()
    assert [multiplier(n) for n in (0, 10, 55, 100)] == pytest.approx([0.01, 0.91, 0.505, 0.1])


def test_resuming_nothing_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match=r"last\.ckpt does not exist"):
        last_state(tmp_path)


class OneWeight(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch):
        time.sleep(0.2)
        return self.layer(torch.ones(1, 1)).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_resumed_run_has_the_whole_time_again(tmp_path):
    settings = RunSettings(tmp_path, 50, precision="32-true", max_time="00:00:00:01")
    steps = [0]
    for _ in range(2):
        resume, first = last_state(tmp_path) if steps[-1] else (None, 0)
        fit(make_trainer(settings), OneWeight(), Batches(numbered_batch, first=first).loader(), resume=resume)
        steps.append(last_state(tmp_path)[1])
    assert 1 <= steps[1] < 50 and 1 < steps[2] - steps[1] < 50
