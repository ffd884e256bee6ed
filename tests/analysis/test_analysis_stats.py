"""Intervals against definitions, numbers computed by hand and their nominal coverage."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from scipy.stats import binomtest
from scipy.stats import t as student

from analysis import stats
from analysis.stats import accuracy_interval, bootstrap_seeds_and_items, effective_items, wilson


def answers(*rows: Sequence[float]) -> np.ndarray:
    return np.array(rows, dtype=np.float64)


@pytest.mark.parametrize(("correct", "n"), [(0, 10), (1, 10), (5, 10), (10, 10), (871, 1319)])
def test_wilson_is_scipys_on_whole_numbers(correct: int, n: int) -> None:
    expected = binomtest(correct, n).proportion_ci(method="wilson")
    assert wilson(correct / n, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_by_hand() -> None:
    """All of n right: high is 1 and low is n / (n + z²) = 10 / (10 + 3.8415)."""
    assert wilson(1.0, 10) == pytest.approx((0.72247, 1.0), abs=1e-5)


@pytest.mark.parametrize("mean", [0.0, 0.0003, 1.0])
@pytest.mark.parametrize("n", [28, 500, 3270])
def test_the_interval_holds_its_mean(mean: float, n: int) -> None:
    low, high = wilson(mean, n)
    assert 0 <= low <= mean <= high <= 1


def test_one_seed_is_worth_its_items() -> None:
    assert effective_items(answers([1, 0, 1, 1])) == pytest.approx(4)


def test_seeds_that_agree_are_worth_one() -> None:
    """Counting 2 * 4 answers would narrow the interval, though the second seed adds no information."""
    assert effective_items(answers([1, 0, 1, 1], [1, 0, 1, 1])) == pytest.approx(4)


def test_seeds_that_disagree_by_hand() -> None:
    """Per-item means 1, 1/2, 1/2, 0: their variance is 1/8, p (1 - p) is 1/4, so 4 items count as 8."""
    assert effective_items(answers([1, 1, 0, 0], [1, 0, 1, 0])) == pytest.approx(8)


def test_disagreement_is_never_worth_more_than_independent_answers() -> None:
    """Per-item means that are all 1/2 have no variance; the interval still has a width."""
    items = answers([1, 0, 1, 0], [0, 1, 0, 1])
    assert effective_items(items) == pytest.approx(8)
    interval = accuracy_interval(items)
    assert interval.high - interval.low > 0.5


@pytest.mark.parametrize("right", [0, 1])
@pytest.mark.parametrize("seeds", [1, 3, 6])
def test_all_right_or_all_wrong_has_wilsons_width(right: int, seeds: int) -> None:
    interval = accuracy_interval(np.full((seeds, 20), right, dtype=np.float64))
    assert (interval.low, interval.high) == pytest.approx(wilson(float(right), 20))
    assert (interval.mean, interval.over) == (right, "test items")


def test_below_five_seeds_the_spread_over_seeds_is_not_in_the_interval() -> None:
    """Four seeds with the largest possible spread on identical items still give an interval over items."""
    items = np.repeat(answers([1], [1], [0], [0]), 100, axis=1)
    interval = accuracy_interval(items)
    assert interval.over == "test items"
    assert interval.high - interval.low < 0.1  # Wilson's on 400 answers; the seeds themselves are 1, 1, 0, 0


def test_from_five_seeds_the_interval_covers_seeds_and_items() -> None:
    items = np.repeat(answers([1], [1], [0], [0], [1]), 100, axis=1)
    interval = accuracy_interval(items)
    assert interval.over == "seeds and test items"
    assert (interval.low, interval.high) == (0, 1)  # 0.6 and 1.58 times 0.2 - 0.6 and 1 - 0.6, clipped to [0, 1]


def test_the_bootstrap_draws_the_same_items_for_all_seeds() -> None:
    """Seeds that agree: the interval must be the one-seed bootstrap's, about 0.5 ± 1.96 * sqrt(0.25 / 100)."""
    low, high = bootstrap_seeds_and_items(np.tile(answers([1, 0] * 50), (5, 1)))
    assert (low, high) == pytest.approx((0.402, 0.598), abs=0.015)


def test_the_same_answers_give_the_same_interval() -> None:
    items = np.random.default_rng(1).integers(0, 2, size=(5, 50)).astype(np.float64)
    assert accuracy_interval(items) == accuracy_interval(items)


def test_the_mean_of_two_benchmarks_by_hand() -> None:
    """Accuracies 1/2 on 4 items and 3/4 on 8: the mean is 5/8 and its variance (1/16 + 3/128) / 4 = 11/512."""
    interval = accuracy_interval(answers([1, 1, 0, 0]), answers([1, 1, 1, 1, 1, 1, 0, 0]))
    assert interval.mean == pytest.approx(5 / 8)
    assert (interval.low, interval.high) == pytest.approx(wilson(5 / 8, (5 / 8 * 3 / 8) / (11 / 512)))


def test_a_mean_weighs_benchmarks_alike_whatever_their_size() -> None:
    items = [np.ones((6, 1000)), np.zeros((6, 10))]
    items[1][0] = 1  # seeds that do not all agree
    interval = accuracy_interval(*items)
    assert interval.mean == pytest.approx((1 + 1 / 6) / 2)
    assert interval.over == "seeds and test items"
    enlarged = (6 / 5) ** 0.5 * 2.5706 / 1.96  # sqrt(S / (S - 1)) and Student's quantile over the normal one
    assert interval.low == pytest.approx(7 / 12 - enlarged / 12, abs=1e-4)  # where the first seed is not drawn


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (5,)])
def test_nothing_to_average_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="at least one"):
        accuracy_interval(np.zeros(shape, dtype=np.float64))


@pytest.mark.parametrize("seeds", [1, 2, 4])
def test_coverage_over_new_items(seeds: int) -> None:
    """Items of differing difficulty, drawn 2,000 times, n = 200: about 95 % of the intervals contain the mean.

    The standard error of the count is 0.5 points, so 93.5 to 96.5 % is three of them on either side.
    """
    generator = np.random.default_rng(0)
    inside = 0
    for _ in range(2000):
        difficulty = generator.beta(3, 1, size=200)  # mean 0.75
        interval = accuracy_interval((generator.random((seeds, 200)) < difficulty).astype(np.float64))
        inside += interval.low <= 0.75 <= interval.high
    assert 0.935 <= inside / 2000 <= 0.965


@pytest.mark.parametrize(("n", "spread"), [(400, 0.3), (100, 0.3), (200, 0.0)])
def test_coverage_over_new_seeds_and_items(n: int, spread: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five seeds of differing skill and items of differing difficulty, both drawn 300 times."""
    monkeypatch.setattr(stats, "DRAWS", 400)
    generator = np.random.default_rng(0)

    def rights(skill: np.ndarray, ease: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-(0.5 + skill + ease)))

    truth = rights(generator.normal(0, spread, 10**6), generator.normal(0, 1.5, 10**6)).mean()
    inside = 0
    for _ in range(300):
        chances = rights(generator.normal(0, spread, (5, 1)), generator.normal(0, 1.5, (1, n)))
        low, high = bootstrap_seeds_and_items((generator.random((5, n)) < chances).astype(np.float64))
        inside += low <= truth <= high
    assert inside / 300 > 0.92


def test_shares_are_worth_what_their_variance_says() -> None:
    """20 completions per problem: item scores near the mean give a narrower interval than Wilson's for 0/1 items."""
    shares = answers([0.4, 0.5, 0.6] * 40)
    assert effective_items(shares) == pytest.approx(120 * 0.25 / (0.02 / 3))
    interval = accuracy_interval(shares)
    standard_error = (0.02 / 3 / 120) ** 0.5
    assert (interval.high - interval.low) / 2 == pytest.approx(1.96 * standard_error, rel=0.01)


def test_a_part_that_is_all_right_is_not_certain() -> None:
    alone = accuracy_interval(np.ones((1, 10)))
    both = accuracy_interval(np.ones((1, 10)), np.tile(answers([1, 0]), (1, 5000)))
    assert both.mean == 0.75
    assert 0.75 - both.low > 0.25 * (1 - alone.low)


@pytest.mark.parametrize("shapes", [[(5, 40)], [(6, 30), (6, 11)]])
def test_replicates_are_drawn_as_defined(shapes: list[tuple[int, int]]) -> None:
    """One replicate at a time: items of every part, then seeds, from one generator; the same for every setting."""
    for setting in range(2):  # the second has the draws of the first
        parts = [np.random.default_rng(n + setting).integers(4, size=(seeds, n)) / 3 for seeds, n in shapes]
        np.testing.assert_allclose(bootstrap_seeds_and_items(*parts), _by_definition(parts), rtol=0, atol=1e-12)


def _by_definition(parts: Sequence[np.ndarray]) -> np.ndarray:
    generator, seeds = np.random.default_rng(0), len(parts[0])
    enlarged = math.sqrt(seeds / (seeds - 1)) * float(student.ppf((1 + stats.LEVEL) / 2, seeds - 1)) / stats.Z
    means = []
    for _ in range(stats.DRAWS):
        rows = [items[:, generator.integers(items.shape[1], size=items.shape[1])].mean(axis=1) for items in parts]
        by_seed = np.mean(rows, axis=0)
        drawn = by_seed[generator.integers(seeds, size=seeds)]
        means.append(by_seed.mean() + enlarged * (drawn.mean() - by_seed.mean()))
    return np.quantile(means, [0.025, 0.975])
