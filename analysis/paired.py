"""Two methods on the same test items: their difference, its interval, a test, and what could have been found.

Pure functions of arrays. Of either method there is one (seeds, n) array per benchmark, of the seeds that both have:
1 where that seed's run answered that test item right and 0 where not, or the share of right completions. Columns are
the same items in both, rows the same seeds. Several benchmarks stand for the plain mean of their accuracies.
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
MANY = 10**9  # degrees of freedom at which Student's t is the normal distribution


@dataclass(frozen=True)
class Difference:
    """First method minus second, in accuracy ([-1, 1])."""

    mean: float
    low: float  # the 95 % interval
    high: float
    over: str  # what the interval and the test draw anew: "test items", or "seeds and test items"
    p_value: float  # two-sided, not corrected for other comparisons
    test: str
    smallest: float  # the difference that this many seeds and items find with 80 % power at the 5 % level
    improvement: float | None  # probability that a seed of the first beats one of the second; None with one seed


def paired_difference(first: Sequence[Items], second: Sequence[Items]) -> Difference:
    """The difference of two methods from their common seeds. ValueError when shapes differ or nothing is there.

    Below `SEEDS_FOR_AN_INTERVAL` seeds (or when all seeds agree) interval and test are about the items alone: what
    other items of the kind would give for these same trained models. From there on they are about new seeds and items.
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
    """Centre and variance of the interval over items.

    Bonett and Price 2012, "Adjusted Wald confidence interval for a difference of binomial proportions based on paired
    data": one item won and one item lost are added, so that there is a width when no item differs. Of several seeds the
    per-item means are taken, as Miller 2024 ("Adding error bars to evals", arXiv 2411.00640) takes them of resamples.
    """
    centres, variances = [], []
    for part in parts:
        scores = np.concatenate([part.mean(axis=0), [1.0, -1.0]])
        centres.append(scores.mean())
        variances.append(scores.var() / len(scores))
    return float(np.mean(centres)), float(np.sum(variances)) / len(parts) ** 2


def item_test(parts: Sequence[Items]) -> tuple[float, str]:
    """The p-value of "on every item either method is as likely to be ahead", and the test's name.

    One seed of right or wrong answers: McNemar's exact test. Otherwise the sign-flip permutation test of the mean over
    items of the per-item mean over seeds.
    """
    if len(parts) == 1 and len(parts[0]) == 1 and np.isin(parts[0], (-1, 0, 1)).all():
        won, lost = (int(np.count_nonzero(parts[0] == sign)) for sign in (1, -1))
        outcome: Any = mcnemar([[0, won], [lost, 0]], exact=True)
        return float(outcome.pvalue), "McNemar, exact"
    return sign_flip([part.mean(axis=0) for part in parts]), "sign flips of items"


def sign_flip(scores: Sequence[Items]) -> float:
    """Two-sided p-value of the mean over parts of the mean of `scores`, (n,) each, when every sign is a coin flip.

    What `scipy.stats.permutation_test(..., permutation_type="samples")` computes. Items of the same size are
    exchangeable, so the number of them that keep their sign is drawn at once, from a binomial distribution: tens of
    thousands of items then take milliseconds. The generator is fixed.
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
    """Variance of the mean difference over new seeds and new items, and its degrees of freedom.

    Every seed meets every item, so both are crossed random effects: the mean over S seeds and n items has the variance
    s²_seed / S + s²_item / n + s²_rest / (S n). It is estimated from the three mean squares, with Satterthwaite's
    degrees of freedom (Clark 1973, "The language-as-fixed-effect fallacy": his quasi-F is this estimate's t squared);
    an estimated component below zero counts as zero. A percentile bootstrap of five seeds would be too narrow: it has
    neither the factor S / (S - 1) nor Student's tails.
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
    """The probability that a seed of the first scores higher than one of the second, ties half, mean over benchmarks.

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
