"""Paired differences against values computed by hand, scipy, and their nominal error rates."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import permutation_test

from analysis.paired import crossed_variance, paired_difference, sign_flip


def answers(*rows: list[float]) -> np.ndarray:
    return np.array(rows, dtype=np.float64)


def test_mcnemar_by_hand() -> None:
    """Five items won, one lost: 2 (C(6, 0) + C(6, 1)) / 2^6 = 14/64."""
    first = answers([1, 1, 1, 1, 1, 0, 1, 0, 0, 1])
    second = answers([0, 0, 0, 0, 0, 1, 1, 0, 0, 1])
    difference = paired_difference([first], [second])
    assert difference.test == "McNemar, exact"
    assert difference.p_value == pytest.approx(14 / 64)
    assert difference.mean == pytest.approx(0.4)
    assert difference.improvement is None


def test_the_interval_over_items_by_hand() -> None:
    """Bonett and Price: of 10 items 5 won and 1 lost become 6 and 2 of 12."""
    first = answers([1, 1, 1, 1, 1, 0, 0, 0, 0, 0])
    second = answers([0, 0, 0, 0, 0, 1, 0, 0, 0, 0])
    difference = paired_difference([first], [second])
    centre, error = 4 / 12, math.sqrt((8 / 12 - (4 / 12) ** 2) / 12)
    assert (difference.low, difference.high) == pytest.approx(
        (centre - 1.95996 * error, centre + 1.95996 * error), rel=1e-4
    )
    assert difference.smallest == pytest.approx((1.95996 + 0.84162) * error, rel=1e-4)


def test_the_smallest_difference_on_gsm8k() -> None:
    """1,319 items of which 15 % differ: 2.80 sqrt(0.15 / 1319) is 3.0 points."""
    second = np.zeros((1, 1319))
    first = second.copy()
    first[0, :99] = 1
    second[0, 99:198] = 1
    assert paired_difference([first], [second]).smallest == pytest.approx(0.030, abs=0.0005)


def test_methods_that_agree_on_every_item() -> None:
    items = answers([1, 0, 1, 1])
    difference = paired_difference([items], [items])
    assert (difference.mean, difference.p_value) == (0, 1)
    assert difference.low < 0 < difference.high


def test_sign_flips_are_scipys_permutation_test() -> None:
    """Per-item means of three seeds against scipy's test over all 2^12 sign patterns."""
    scores = np.array([1, 1, 1 / 3, -1 / 3, 2 / 3, 2 / 3, 1 / 3, 0, 1, -2 / 3, 1 / 3, 1 / 3])
    exact = permutation_test(
        (scores,), lambda x, axis: x.mean(axis=axis), permutation_type="samples", vectorized=True, n_resamples=5000
    )
    assert sign_flip([scores]) == pytest.approx(exact.pvalue, abs=0.003)


def test_a_mean_weighs_its_benchmarks_alike() -> None:
    first, second = [answers([1] * 10), answers([1] * 1000)], [answers([0] * 10), answers([1] * 1000)]
    difference = paired_difference(first, second)
    assert difference.mean == pytest.approx(0.5)
    assert difference.p_value == pytest.approx(2 / 2**10, abs=0.0005)  # all ten signs equal


def test_probability_of_improvement_by_hand() -> None:
    """Seeds 0.5, 1.0 against 0.5, 0.0: three of four pairs are won and one is a tie."""
    difference = paired_difference([answers([1, 0], [1, 1])], [answers([0, 1], [0, 0])])
    assert difference.improvement == pytest.approx(3.5 / 4)


def test_the_crossed_variance_by_hand() -> None:
    """Only seed effects, -1, 0, 1: the variance of the mean of three is 1/3, with 2 degrees of freedom."""
    part = np.repeat(answers([-1], [0], [1]), 50, axis=1)
    assert crossed_variance([part]) == pytest.approx((1 / 3, 2))


def test_from_five_seeds_the_seeds_count() -> None:
    """Five seeds that each win or lose every item are no significant evidence, however many items there are."""
    first = np.repeat(answers([1], [1], [1], [0], [0]), 1000, axis=1)
    difference = paired_difference([first], [1 - first])
    assert difference.over == "seeds and test items"
    assert difference.p_value > 0.5
    fewer = paired_difference([first[:4]], [1 - first[:4]])
    assert fewer.over == "test items"
    assert fewer.p_value < 0.001


@pytest.mark.parametrize("shapes", [((2, 3), (2, 4)), ((2, 3), (1, 3)), ((0, 3), (0, 3))])
def test_what_cannot_be_paired_is_refused(shapes: tuple[tuple[int, int], tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match="seed"):
        paired_difference([np.zeros(shapes[0])], [np.zeros(shapes[1])])


def answered(
    generator: np.random.Generator, seeds: int, spread: float, ahead: float = 0, n: int = 200
) -> tuple[np.ndarray, np.ndarray]:
    """Simulate two methods on items of differing difficulty, with seed effects and method-item effects."""
    difficulty = generator.normal(0.5, 1, size=n)

    def method(shift: float) -> np.ndarray:
        effects = difficulty + generator.normal(0, 0.4, size=n) + generator.normal(0, spread, size=(seeds, 1))
        return (effects + generator.normal(0, 0.7, size=(seeds, n)) + shift > 0).astype(np.float64)

    return method(0), method(ahead)


@pytest.mark.parametrize(("seeds", "spread"), [(1, 0.0), (5, 0.0), (5, 0.4)])
def test_level_and_coverage(seeds: int, spread: float) -> None:
    """400 trials without a difference: about 5 % rejected and 95 % covered; three standard errors are 3.3 points."""
    generator = np.random.default_rng(1)
    found = [paired_difference(*([one] for one in answered(generator, seeds, spread))) for _ in range(400)]
    assert np.mean([difference.p_value < 0.05 for difference in found]) < 0.083
    assert np.mean([difference.low <= 0 <= difference.high for difference in found]) > 0.917


def test_power_at_the_smallest_difference() -> None:
    """A difference of the size `smallest` is detected in about 80 % of 200 trials."""
    generator = np.random.default_rng(2)
    found = [paired_difference(*([one] for one in answered(generator, 1, 0, ahead=0.3, n=300))) for _ in range(200)]
    truth, smallest = (np.mean([getattr(one, name) for one in found]) for name in ("mean", "smallest"))
    assert abs(truth) == pytest.approx(smallest, abs=0.012)
    assert 0.7 < np.mean([one.p_value < 0.05 for one in found]) < 0.9
