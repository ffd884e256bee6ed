"""Differences in NLL: the registered interval against its definition and against simulations."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from analysis.nll import Difference, nll_difference, verdict


def test_without_spread_over_rows_it_is_the_paired_t_test() -> None:
    first = np.array([[0.80], [0.82], [0.79], [0.83], [0.80]]).repeat(7, axis=1)
    second = np.array([[0.81], [0.82], [0.82], [0.84], [0.83]]).repeat(7, axis=1)
    found = nll_difference([first], [second])
    test = stats.ttest_rel(first[:, 0], second[:, 0])
    interval = test.confidence_interval(0.95)
    assert found.mean == pytest.approx(-0.016)
    assert found.p == pytest.approx(test.pvalue)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    error = np.std(first[:, 0] - second[:, 0], ddof=1) / math.sqrt(5)
    assert found.smallest == pytest.approx((2.7764451 + 0.9409646) * error)


def test_rows_add_their_variance_and_benchmarks_count_alike() -> None:
    generator = np.random.default_rng(0)
    parts = [(generator.normal(size=(5, n)), generator.normal(size=(5, n))) for n in (40, 400)]
    found = nll_difference([one for one, _ in parts], [other for _, other in parts])
    gaps = [one - other for one, other in parts]
    assert found.mean == pytest.approx((gaps[0].mean() + gaps[1].mean()) / 2)
    by_seed = (gaps[0].mean(axis=1) + gaps[1].mean(axis=1)) / 2
    rows = (gaps[0].mean(axis=0).var(ddof=1) / 40 + gaps[1].mean(axis=0).var(ddof=1) / 400) / 4
    half = stats.t.ppf(0.975, 4) * math.sqrt(by_seed.var(ddof=1) / 5 + rows)
    assert found.high - found.mean == pytest.approx(half)


def test_the_interval_holds_the_truth_and_the_smallest_difference_is_found() -> None:
    """500 simulated pairs with seed, row and interaction effects, and a true difference of the detectable size."""
    generator = np.random.default_rng(1)
    truth, held, found = 0.02, 0, 0
    smallest = []
    for _ in range(500):
        seeds, rows = generator.normal(0, 0.006, (5, 1)), generator.normal(0, 0.1, (1, 300))
        gap = truth + seeds + rows + generator.normal(0, 0.05, (5, 300))
        one = nll_difference([gap], [np.zeros_like(gap)])
        held += one.low <= truth <= one.high
        found += one.p < 0.05
        smallest.append(one.smallest)
    assert held / 500 >= 0.95  # slightly too wide, by its definition
    power = found / 500
    at_truth = float(np.mean(np.array(smallest) <= truth))
    assert (power >= 0.8) == (at_truth >= 0.5)


@pytest.mark.parametrize(
    ("difference", "p_holm", "said"),
    [
        (Difference(-0.03, -0.04, -0.02, 0.0, 0.01, 5), 0.001, "better"),
        (Difference(0.03, 0.02, 0.04, 0.0, 0.01, 5), 0.001, "worse"),
        (Difference(0.005, 0.004, 0.006, 0.0, 0.002, 5), 0.001, "worse, by less than 0.01"),
        (Difference(0.001, -0.008, 0.009, 0.5, 0.01, 5), 1.0, "equal within 0.01"),
        (Difference(0.001, -0.02, 0.02, 0.5, 0.03, 5), 1.0, "cannot say"),
        (Difference(-0.03, -0.04, -0.02, 0.0, 0.01, 3), 0.001, "cannot say (3 seeds)"),
    ],
)
def test_verdicts_are_the_registered_ones(difference: Difference, p_holm: float, said: str) -> None:
    assert verdict(difference, p_holm) == said


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="not the same rows"):
        nll_difference([np.zeros((5, 3))], [np.zeros((5, 4))])
    with pytest.raises(ValueError, match="one seed"):
        nll_difference([np.zeros((1, 3))], [np.zeros((1, 3))])
