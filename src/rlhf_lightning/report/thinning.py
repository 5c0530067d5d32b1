"""Long curves made short without changing the picture."""

from __future__ import annotations

import numpy as np

from rlhf_lightning.report.logs import Numbers

_POINTS_PER_COLUMN = 4


def thin(x: Numbers, y: Numbers, columns: int) -> tuple[Numbers, Numbers]:
    """Of each column of the picture the first, lowest, highest and last point: drawn, it is the same line.

    Source: Jugel et al. 2014, "M4: a visualization-oriented time series data aggregation".

    Args:
        x: ascending, `[N]`.
        y: finite, `[N]`.
        columns: width of the picture in pixels.

    Returns:
        At most four points for each column, in order; all of them where they are no more.

    Example:
        >>> x = np.arange(1000.0)
        >>> [len(part) for part in thin(x, np.sin(x), 10)]
        [39, 39]
    """
    if len(x) <= _POINTS_PER_COLUMN * columns:
        return x, y
    width = (x[-1] - x[0]) or 1.0
    column = np.minimum((x - x[0]) * columns / width, columns - 1).astype(np.int64)
    by_value = np.lexsort((y, column))  # within each column from the lowest to the highest
    starts = np.flatnonzero(np.diff(column, prepend=-1))
    ends = np.append(starts[1:], len(x)) - 1
    kept = np.unique(np.concatenate([starts, ends, by_value[starts], by_value[ends]]))
    return x[kept], y[kept]


def smoothing_width(count: int) -> int:
    """Points over which a curve of `count` points is averaged for the eye: a fortieth, odd; 1 for short curves."""
    return count // 40 | 1 if count >= 80 else 1


def smooth(y: Numbers, width: int) -> Numbers:
    """Centred means; at the ends of fewer points.

    Args:
        y: `[N]`, finite.
        width: points of a mean, odd.

    Example:
        >>> smooth(np.array([0.0, 3.0, 0.0, 3.0]), 3).tolist()
        [1.5, 1.0, 2.0, 1.5]
    """
    sums = np.concatenate([[0.0], np.cumsum(y)])
    places = np.arange(len(y))
    low, high = np.maximum(places - width // 2, 0), np.minimum(places + width // 2 + 1, len(y))
    return (sums[high] - sums[low]) / (high - low)
