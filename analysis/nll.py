"""Differences in negative log-likelihood (NLL) between two settings, over seeds and test rows.

Both settings were trained with the same seeds (a seed fixes the rows and their order) and scored on the same test rows.
Lower is better, so a difference below zero means that the first setting is better.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

LEVEL = 0.95
POWER = 0.8
MARGIN = 0.01  # nats per token, 1 % of perplexity; settings within it count as equal
SEEDS_FOR_A_VERDICT = 5

Items = NDArray[np.float64]


@dataclass(frozen=True)
class Difference:
    """`mean` of first minus second with its 95 % interval; `p` for no difference; `smallest`: found with 80 % power."""

    mean: float
    low: float
    high: float
    p: float
    smallest: float
    seeds: int

    @property
    def is_within_margin(self) -> bool:
        return self.low > -MARGIN and self.high < MARGIN

    @property
    def has_enough_seeds(self) -> bool:
        return self.seeds >= SEEDS_FOR_A_VERDICT


def nll_difference(first: Sequence[Items], second: Sequence[Items]) -> Difference:
    """Return the difference of two settings, averaged over benchmarks.

    SE² = var(d_s) / S + mean of the benchmarks' var_rows / R: d_s is the difference of seed s, var_rows the variance
    over the R rows of the difference averaged over seeds. Both terms contain the interaction of rows and seeds, so the
    interval is slightly too wide. Student's t has S - 1 degrees of freedom.

    Args:
        first, second: one (seeds, rows) array per benchmark, each row's NLL scaled so that the mean over rows is the
            NLL per token.

    Raises:
        ValueError: the two sides have different shapes, or there are fewer than two seeds.
    """
    if [part.shape for part in first] != [part.shape for part in second]:
        raise ValueError(
            f"{[part.shape for part in first]} and {[part.shape for part in second]} are not the same rows"
        )
    differences = [one - other for one, other in zip(first, second, strict=True)]
    seeds, parts = len(differences[0]), len(differences)
    if seeds < 2:
        raise ValueError("one seed does not show the spread over seeds: give two or more")
    by_seed = np.mean([part.mean(axis=1) for part in differences], axis=0)
    of_rows = sum(float(part.mean(axis=0).var(ddof=1)) / part.shape[1] for part in differences) / parts**2
    error = math.sqrt(float(by_seed.var(ddof=1)) / seeds + of_rows)
    mean, df = float(by_seed.mean()), seeds - 1
    quantile = float(student.ppf((1 + LEVEL) / 2, df))
    p = 2 * float(student.sf(abs(mean) / error, df)) if error else float(mean == 0)
    smallest = (quantile + float(student.ppf(POWER, df))) * error
    return Difference(mean, mean - quantile * error, mean + quantile * error, p, smallest, seeds)


def verdict(difference: Difference, p_holm: float) -> str:
    """Return the verdict on the first setting by the registered rule."""
    if not difference.has_enough_seeds:
        return f"cannot say ({difference.seeds} seeds)"
    within = difference.is_within_margin
    if p_holm < 1 - LEVEL:
        return ("better" if difference.mean < 0 else "worse") + (f", by less than {MARGIN}" if within else "")
    return f"equal within {MARGIN}" if within else "cannot say"
