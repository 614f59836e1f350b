"""The learning-rate schedule against its closed form."""

import pytest

from ldm.lr_scheduler import LambdaLinearScheduler


def test_the_published_schedule_warms_up_and_stays():
    schedule = LambdaLinearScheduler([10000], [1.0], [1.0], [1e-6], [10000000000000])
    assert schedule(0) == pytest.approx(1e-6)
    assert schedule(2500) == pytest.approx(1e-6 + 0.25 * (1 - 1e-6))
    assert [schedule(n) for n in (10000, 123456, 10**12)] == [1.0, 1.0, 1.0]


def test_two_cycles_follow_the_lines_from_f_max_at_their_start_to_f_min_at_their_end():
    schedule = LambdaLinearScheduler([4, 2], [0.1, 0.0], [1.0, 0.5], [0.2, 0.1], [10, 6])
    first = [0.2, 0.4, 0.6, 0.8, 0.64, 0.55, 0.46, 0.37, 0.28, 0.19]
    second = [0.1, 0.3, 1 / 3, 1 / 4, 1 / 6, 1 / 12]
    assert [schedule(n) for n in range(16)] == pytest.approx(first + second)
    assert [schedule.schedule(n) for n in (16, 17, 500)] == [0.0, 0.0, 0.0]


def test_lists_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="one entry a cycle"):
        LambdaLinearScheduler([1, 2], [1.0], [1.0], [0.1], [10])
