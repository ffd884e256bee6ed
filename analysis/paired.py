"""Two methods on the same test items: difference, interval, test and power.

Pure functions of arrays. Each method has one (seeds, n) array per benchmark, over the common seeds: 1 if that seed's
run answered that test item right, else 0, or the share of right completions. Both have the same items as columns and
the same seeds as rows. Several benchmarks stand for the unweighted mean of their accuracies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import mannwhitneyu, t
from statsmodels.stats.contingency_tables import mcnemar

from analysis.stats import LEVEL, SEEDS_FOR_AN_INTERVAL

Items = NDArray[np.float64]

POWER = 0.8
FLIPS = 99_999  # sign flips drawn; the p-value's own standard error at 0.05 is then 0.0007
MANY = 10**9  # degrees of freedom at which Student's t is practically normal


@dataclass(frozen=True)
class Difference:
    """First method minus second, in accuracy ([-1, 1])."""

    mean: float
    low: float  # the 95 % interval
    high: float
    over: str  # what interval and test resample: "test items", or "seeds and test items"
    p_value: float  # two-sided, not corrected for other comparisons
    test: str
    smallest: float  # smallest difference that this many seeds and items detect with 80 % power at the 5 % level
    improvement: float | None  # probability that a seed of the first beats one of the second; None for one seed


def paired_difference(first: Sequence[Items], second: Sequence[Items]) -> Difference:
    """Return the difference of two methods over their common seeds. ValueError if shapes differ or are empty.

    Below `SEEDS_FOR_AN_INTERVAL` seeds (or if all seeds agree), interval and test are over items only: they describe
    these trained models on other items of the same kind. From there on, they are over new seeds and new items.
    """
    if [part.shape for part in first] != [part.shape for part in second]:
        raise ValueError("the two methods must have the same seeds and items")
    parts = [ours - theirs for ours, theirs in zip(first, second, strict=True)]
    if not parts or any(part.ndim != 2 or part.size == 0 for part in parts):
        raise ValueError("differences need at least one seed and one item")
    mean = float(np.mean([part.mean() for part in parts]))
    seeds_agree = all((part == part[0]).all() for part in parts)
    if len(parts[0]) >= SEEDS_FOR_AN_INTERVAL and not seeds_agree:
        centre, (variance, freedom) = mean, crossed_variance(parts)
        over, test = "seeds and test items", "crossed random effects"
        p_value = 2 * float(t.sf(abs(mean) / math.sqrt(variance), freedom))
    else:
        (centre, variance), freedom, over = item_variance(parts), MANY, "test items"
        p_value, test = item_test(parts)
    half = float(t.ppf((1 + LEVEL) / 2, freedom)) * math.sqrt(variance)
    return Difference(
        mean=mean,
        low=max(-1.0, centre - half),
        high=min(1.0, centre + half),
        over=over,
        p_value=p_value,
        test=test,
        smallest=half + float(t.ppf(POWER, freedom)) * math.sqrt(variance),
        improvement=probability_of_improvement(first, second),
    )


def item_variance(parts: Sequence[Items]) -> tuple[float, float]:
    """Return centre and variance of the interval over items.

    Bonett and Price 2012, "Adjusted Wald confidence interval for a difference of binomial proportions based on paired
    data": one item won and one item lost are added, so that the interval has a width even if no item differs. For
    several seeds, per-item means are used, as in Miller 2024 ("Adding error bars to evals", arXiv 2411.00640) for
    resamples.
    """
    centres, variances = [], []
    for part in parts:
        scores = np.concatenate([part.mean(axis=0), [1.0, -1.0]])
        centres.append(scores.mean())
        variances.append(scores.var() / len(scores))
    return float(np.mean(centres)), float(np.sum(variances)) / len(parts) ** 2


def item_test(parts: Sequence[Items]) -> tuple[float, str]:
    """Return the p-value of "on every item, both methods are equally likely to be ahead", and the test's name.

    For one seed of right or wrong answers: McNemar's exact test. Otherwise: a sign-flip permutation test of the mean
    over items of the per-item mean over seeds.
    """
    if len(parts) == 1 and len(parts[0]) == 1 and np.isin(parts[0], (-1, 0, 1)).all():
        won, lost = (int(np.count_nonzero(parts[0] == sign)) for sign in (1, -1))
        outcome: Any = mcnemar([[0, won], [lost, 0]], exact=True)
        return float(outcome.pvalue), "McNemar, exact"
    return sign_flip([part.mean(axis=0) for part in parts]), "sign flips of items"


def sign_flip(scores: Sequence[Items]) -> float:
    """Return the two-sided p-value of the mean over parts of the mean of `scores`, (n,) each, under random signs.

    Equals `scipy.stats.permutation_test(..., permutation_type="samples")`. Items of equal magnitude are exchangeable,
    so the number of them that keep their sign is drawn at once, from a binomial distribution: tens of thousands of
    items take milliseconds. The generator's seed is fixed.
    """
    generator = np.random.default_rng(0)
    drawn = np.zeros(FLIPS)
    for part in scores:
        sizes, counts = np.unique(np.round(np.abs(part[part != 0]), 9), return_counts=True)
        kept = generator.binomial(counts, 0.5, size=(FLIPS, len(counts)))
        drawn += (2 * kept - counts) @ sizes / len(part) / len(scores)
    observed = abs(np.mean([part.mean() for part in scores]))
    return float(1 + np.count_nonzero(np.abs(drawn) >= observed - 1e-9)) / (1 + FLIPS)


def crossed_variance(parts: Sequence[Items]) -> tuple[float, float]:
    """Return the variance of the mean difference over new seeds and new items, and its degrees of freedom.

    Every seed answers every item, so both are crossed random effects: the mean over S seeds and n items has the
    variance s²_seed / S + s²_item / n + s²_rest / (S n). It is estimated from the three mean squares, with
    Satterthwaite's degrees of freedom (Clark 1973, "The language-as-fixed-effect fallacy": his quasi-F is this
    estimate's t squared); negative component estimates count as zero. A percentile bootstrap of five seeds would be too
    narrow: it lacks the factor S / (S - 1) and Student's tails.
    """
    seeds = len(parts[0])
    by_seed = np.mean([part.mean(axis=1) for part in parts], axis=0)
    seed = float(by_seed.var(ddof=1)) / seeds
    item = rest = 0.0
    for part in parts:
        n = part.shape[1]
        means = part.mean(axis=0)
        residual = part - part.mean(axis=1, keepdims=True) - means + part.mean()
        item += float(means.var(ddof=1)) / n if n > 1 else 0.0
        rest += float(np.square(residual).sum()) / max(1, (seeds - 1) * (n - 1)) / (seeds * n)
    item, rest = item / len(parts) ** 2, rest / len(parts) ** 2
    variance = max(seed - rest, 0) + max(item - rest, 0) + rest
    items = max(1, sum(part.shape[1] - 1 for part in parts))
    spread = seed**2 / (seeds - 1) + item**2 / items + rest**2 / ((seeds - 1) * items)
    return variance, variance**2 / spread


def probability_of_improvement(first: Sequence[Items], second: Sequence[Items]) -> float | None:
    """Return the probability that a seed of the first beats one of the second; ties count half, benchmarks averaged.

    The definition of Agarwal et al. 2021 (arXiv 2108.13264): the Mann-Whitney statistic over the product of the counts.
    """
    if len(first[0]) < 2:
        return None
    return float(
        np.mean(
            [
                mannwhitneyu(ours.mean(axis=1), theirs.mean(axis=1), method="asymptotic").statistic
                / (len(ours) * len(theirs))
                for ours, theirs in zip(first, second, strict=True)
            ]
        )
    )
