"""Intervals of numbers that are made of sums over rows, by the percentile bootstrap.

Notation: N rows, K sums, S samples.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Statistic = Callable[[Array], Array]
SAMPLES = 2000
_COUNTS_AT_ONCE = 4_000_000


def mean_ratio(totals: Array) -> Array:
    """The first sum divided by the second, `[..., 2]` to `[...]`."""
    ratios: Array = totals[..., 0] / totals[..., 1]
    return ratios


def bootstrap_interval(
    sums: Array, statistic: Statistic = mean_ratio, seed: int = 0, samples: int = SAMPLES, level: float = 0.95
) -> tuple[float, float] | None:
    """Between which values a number lies when other rows of the same kind had been drawn.

    Rows are drawn anew with replacement (Efron 1979), and the interval is between two percentiles of what comes out
    (Efron and Tibshirani 1993, chapter 13). A row is drawn with all it brings, so tokens of one response or pairs of
    one ranking are not taken for independent.

    Args:
        sums: what each row adds to each sum, `[N, K]`.
        statistic: from sums over rows, `[S, K]`, to numbers, `[S]`.
        seed: of what is drawn.
        samples: S.
        level: share of samples inside.

    Returns:
        Where the interval begins and ends; None for fewer than two rows, which say nothing of others.

    Example:
        >>> bootstrap_interval(np.array([[1.0, 1.0]] * 5 + [[0.0, 1.0]] * 5))
        (0.2, 0.8)
    """
    rows = len(sums)
    if rows < 2:
        return None
    rng, found = np.random.default_rng(seed), []
    at_once = max(1, _COUNTS_AT_ONCE // rows)
    for start in range(0, samples, at_once):
        counts = rng.multinomial(rows, np.full(rows, 1 / rows), size=min(at_once, samples - start))  # [S, N]
        with np.errstate(divide="ignore", invalid="ignore"):  # a sample may hold nothing of what is divided by
            found.append(statistic(counts @ sums))
    tail = 50 * (1 - level)
    low, high = np.nanpercentile(np.concatenate(found), [tail, 100 - tail])
    return float(low), float(high)
