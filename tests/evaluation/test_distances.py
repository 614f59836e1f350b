"""Distances of features against closed forms, torchmetrics, and the figures of clean-fid and torch-fidelity."""

import json

import numpy as np
import pytest
import torch
from torchmetrics.image.fid import _compute_fid
from torchmetrics.image.kid import poly_mmd

from ldm.evaluation.bootstrap import around, draws, mean_of
from ldm.evaluation.distances import Frechet, Gaussian, gaussian_of, inside, kernel_distance, thinned
from tests.support.paths import GOLDEN

CASES = {"small": (300, 8), "wide": (90, 24), "few": (40, 60)}


def sets(case):
    """Two sets of features with different means and covariances, the same on every machine."""
    count, width = CASES[case]
    rng = np.random.default_rng(7)
    mix = rng.standard_normal((width, width)) / np.sqrt(width)
    x = rng.standard_normal((count, width)).astype(np.float32)
    y = (rng.standard_normal((count + 20, width)) @ mix + 0.3).astype(np.float32)
    return x, y


def frechet(x, y):
    return Frechet(gaussian_of(y))(gaussian_of(x))


@pytest.mark.parametrize("case", CASES)
def test_distances_are_those_of_the_other_libraries(case):
    x, y = sets(case)
    golden = json.loads((GOLDEN / "distances.json").read_text())[case]
    assert frechet(x, y) == pytest.approx(golden["clean-fid fid"], rel=1e-6)
    assert frechet(x, y) == pytest.approx(golden["torch-fidelity fid"], rel=1e-6)
    for library in ("clean-fid", "torch-fidelity"):  # which take sets of one size
        assert kernel_distance(x, y[: len(x)])[0] == pytest.approx(golden[f"{library} kid"], rel=1e-6)
    assert inside(x, y).mean() == pytest.approx(golden["torch-fidelity precision"], abs=1e-6)
    assert inside(y, x).mean() == pytest.approx(golden["torch-fidelity recall"], abs=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_distances_are_those_of_torchmetrics(case):
    x, y = sets(case)
    a, b = gaussian_of(x), gaussian_of(y)
    tensors = [torch.from_numpy(value) for value in (a.mean, a.covariance, b.mean, b.covariance)]
    assert frechet(x, y) == pytest.approx(float(_compute_fid(*tensors)), rel=1e-6)
    first, second = (torch.from_numpy(part[: len(x)]).double() for part in (x, y))
    assert kernel_distance(x, y[: len(x)])[0] == pytest.approx(float(poly_mmd(second, first)), rel=1e-6)


def test_gaussians_of_diagonal_covariance_have_the_closed_form():
    rng = np.random.default_rng(0)
    m, n = rng.standard_normal((2, 12))
    s, t = rng.uniform(0.1, 3, (2, 12))
    turn, _ = np.linalg.qr(rng.standard_normal((12, 12)))
    a, b = (Gaussian(0, turn @ mean, turn @ np.diag(std**2) @ turn.T) for mean, std in ((m, s), (n, t)))
    assert Frechet(b)(a) == pytest.approx(((m - n) ** 2).sum() + ((s - t) ** 2).sum(), rel=1e-9)


def test_a_set_is_at_distance_0_from_itself_and_inside_its_own_manifold():
    x, _ = sets("small")
    assert frechet(x, x) == pytest.approx(0, abs=1e-8)
    assert inside(x, x).all()
    assert not inside(x + 100, x).any()


def test_the_kernel_distance_of_two_halves_is_0_on_the_average():
    rng = np.random.default_rng(1)
    found = [kernel_distance(*rng.standard_normal((2, 60, 5)))[0] for _ in range(200)]
    assert abs(np.mean(found)) < 3 * np.std(found) / np.sqrt(len(found))


def test_weights_repeat_images():
    x, y = sets("small")
    counts = draws(len(x), 2)
    repeated = np.repeat(x, counts[0], axis=0)
    assert frechet(repeated, y) == pytest.approx(Frechet(gaussian_of(y))(gaussian_of(x, counts[0])), rel=1e-9)
    assert counts.sum(1).tolist() == [len(x)] * 2
    once = np.ones((1, len(x)))
    assert kernel_distance(x, y, once)[0] == pytest.approx(kernel_distance(x, y)[0], rel=1e-12)
    half = np.concatenate([np.ones(150), np.zeros(150)])[None]
    assert kernel_distance(x, y, half)[0] == pytest.approx(kernel_distance(x[:150], y)[0], rel=1e-9)


def test_intervals_hold_the_true_mean_as_often_as_they_promise():
    rng = np.random.default_rng(3)
    found = [mean_of(rng.standard_exponential(40), 200, seed) for seed in range(200)]
    assert 0.88 <= np.mean([one.low <= 1 <= one.high for one in found]) <= 0.99
    biased = around(1.0, [4.0, 5.0, 6.0])
    assert (biased.low, biased.high) == pytest.approx((1 - 0.95, 1 + 0.95))


def test_thinning_keeps_the_ends_and_the_number():
    kept = thinned(np.arange(1000.0)[:, None], 10)
    assert (len(kept), kept[0, 0], kept[-1, 0]) == (10, 0, 999)
