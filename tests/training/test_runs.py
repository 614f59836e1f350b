"""Numbered batches and progress of a training run."""

from itertools import islice

import pytest

from ldm.training.runs import Batches, Optimisation, last_state
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
