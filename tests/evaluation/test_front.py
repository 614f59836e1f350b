"""Quality over time: the settings that no other one beats."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from ldm.evaluation.front import front, plot_front, qualities
from ldm.evaluation.results import Result


def beaten(point: tuple[float, float], others: list[tuple[float, float]]) -> bool:
    """By the definition: some other point is no worse in both and better in one."""
    return any(t <= point[0] and q >= point[1] and (t, q) != point for t, q in others)


def test_the_front_is_what_nothing_beats() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        points = [(float(t), float(q)) for t, q in rng.integers(0, 6, (8, 2))]
        chosen = [points[i] for i in front(points)]
        assert chosen == sorted(set(chosen))
        assert set(chosen) == {point for point in points if not beaten(point, points)}


def test_times_and_qualities_come_from_the_results(tmp_path) -> None:
    def result(images_of: str, metric: str, value: float) -> Result:
        return Result(images_of, metric, value, None, None, 9)

    results = [
        result("exact", "right", 90.0), result("fast", "right", 80.0), result("slow", "right", 70.0),
        result("exact and fast", "psnr", 30.0), result("exact and slow", "psnr", 20.0),
        result("exact", "answers", 5.0),
        result("exact and fast", "share of time", 0.5), result("exact and slow", "share of time", 2.0),
    ]  # fmt: skip
    found = qualities(results, "exact", ["fast", "slow"])
    assert found == {
        "right": {"exact": (1.0, 90.0), "fast": (0.5, 80.0), "slow": (2.0, 70.0)},
        "psnr": {"fast": (0.5, 30.0), "slow": (2.0, 20.0)},
    }
    pytest.importorskip("matplotlib")
    plot_front(found, tmp_path / "front.png")
    with Image.open(tmp_path / "front.png") as page:
        assert page.size == (1100, 450)
