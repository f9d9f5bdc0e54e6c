"""95 % intervals: Wilson for shares, the bootstrap for everything else.  Numbers only."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Z95 = 1.959963984540054  # the normal quantile of 97.5 %


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure between two bounds, from `n` observations.  Shares are 0..1, nan where nothing was observed."""

    value: float
    low: float
    high: float
    n: int


def wilson(hits: int, n: int, z: float = Z95) -> Interval:
    """The score interval of a share `hits / n` (Wilson 1927): sound near 0 and 1, where the usual one is not."""
    if n == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    p = hits / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low = 0.0 if hits == 0 else centre - half  # exact at the ends; rounding would leave 1e-17
    high = 1.0 if hits == n else centre + half
    return Interval(p, low, high, n)


def bootstrap_over(n: int, statistic: Callable[[np.ndarray], float], *, n_draws: int = 200, seed: int = 0) -> Interval:
    """The percentile interval of a statistic that is no ratio of sums; it gets the numbers of the groups drawn [n]."""
    if n == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    rng = np.random.default_rng(seed)
    values = [statistic(rng.integers(0, n, n)) for _ in range(n_draws)]
    low, high = np.quantile(values, (0.025, 0.975))
    return Interval(statistic(np.arange(n)), float(low), float(high), n)


def bootstrap(
    groups: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], *, n_draws: int = 1000, seed: int = 0
) -> Interval:
    """The percentile interval of a statistic of summed counts, whole groups drawn with replacement.

    `groups` [G, C]: the counts of each answer or dialogue; `statistic` maps sums [..., C] to values [...].
    A dialogue's calls hang together, so dialogues are drawn and not calls (Efron and Tibshirani, 1993, section 8).
    """
    groups = np.asarray(groups, np.float64)
    n = len(groups)
    if n == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    value = float(statistic(groups.sum(0)))
    rng = np.random.default_rng(seed)
    draws = np.stack([groups[rng.integers(0, n, n)].sum(0) for _ in range(n_draws)])  # [n_draws, C]
    values = statistic(draws)
    values = values[np.isfinite(values)]
    if not len(values):
        return Interval(value, math.nan, math.nan, n)
    low, high = np.quantile(values, (0.025, 0.975))
    return Interval(value, float(low), float(high), n)
