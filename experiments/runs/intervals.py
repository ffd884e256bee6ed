"""Wilson's interval of an accuracy. Standard library only."""

from __future__ import annotations

import math
from statistics import NormalDist

LEVEL = 0.95
Z = NormalDist().inv_cdf((1 + LEVEL) / 2)


def wilson(mean: float, n: float) -> tuple[float, float]:
    """Return Wilson's 95 % score interval of a proportion `mean` observed on `n` items; `n` may be fractional.

    Equals `scipy.stats.binomtest(k, n).proportion_ci(method="wilson")`, which takes integers only. It stays inside
    [0, 1] and has a width even if every answer is right.
    """
    centre = (mean + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(mean * (1 - mean) / n + Z**2 / (4 * n**2))
    # At 0 and 1 the bound equals the mean, which rounding may miss by 1e-19.
    return max(0.0, min(centre - half, mean)), min(1.0, max(centre + half, mean))
