"""From what was found of each row to numbers with intervals, overall and by groups of rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pytorch_lightning.utilities.rank_zero import rank_zero_warn

from rlhf_lightning.evaluation.results import Result
from rlhf_lightning.evaluation.rows import TextRow
from rlhf_lightning.functional.intervals import Array, Statistic, bootstrap_interval, mean_ratio

ALL = "all"


def result(
    metric: str, model: str, sums: Any, seed: int, statistic: Statistic = mean_ratio, group: str = ALL
) -> Result | None:
    """A number with its 95% interval; None where there is nothing to make it of.

    Rows that hold no finite number are left out, and that is said.

    Args:
        metric: what is measured.
        model: whose.
        sums: what each row adds to each sum, `[N, K]`.
        seed: of the interval.
        statistic: from sums over rows, `[..., K]`, to the number; by default the first divided by the second.
        group: of which rows.
    """
    table: Array = np.asarray(sums, dtype=np.float64)
    if len(table) and not (sound := np.isfinite(table).all(axis=1)).all():
        lost = len(table) - int(sound.sum())
        rank_zero_warn(f"{metric} of {model}: {lost} of {len(table)} rows have no finite number and are left out")
        table = table[sound]
    if len(table) == 0:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(statistic(table.sum(axis=0)))
    if np.isnan(value):
        return None
    low, high = bootstrap_interval(table, statistic, seed) or (None, None)
    return Result(metric, model, group, value, low, high, len(table))


def results_by_group(
    metric: str,
    model: str,
    sums: Any,
    groups: Mapping[str, Any],
    seed: int,
    statistic: Statistic = mean_ratio,
) -> list[Result]:
    """The same number for several groups of rows.

    Args:
        metric: what is measured.
        model: whose.
        sums: what each row adds to each sum, `[N, K]`.
        groups: which rows belong to each, `[N]`, bool.
        seed: of the intervals.
        statistic: see `result`.
    """
    table = np.asarray(sums, dtype=np.float64)
    found = [result(metric, model, table[inside], seed, statistic, group) for group, inside in groups.items()]
    return [one for one in found if one is not None]


def sources(rows: Sequence[TextRow]) -> dict[str, Any]:
    """All rows, and where they come from several sources the rows of each."""
    names = np.array([row.source for row in rows])
    each = list(dict.fromkeys(names.tolist()))
    groups = {f"source={name}": names == name for name in each} if len(each) > 1 else {}
    return {ALL: np.ones(len(rows), dtype=bool), **groups}


def intervals_of(numbers: Any, name: str, edges: Sequence[float]) -> dict[str, Any]:
    """Groups of rows by where a number of theirs lies, each from its lower edge to below its upper one.

    Args:
        numbers: one for each row, `[N]`.
        name: what the number is.
        edges: between which the groups lie, in order; the outer groups are open.

    Example:
        >>> {group: inside.tolist() for group, inside in intervals_of([-7, 0, 3], "length", [2]).items()}
        {'length=..+2': [True, True, False], 'length=+2..': [False, False, True]}
    """
    values, bounds = np.asarray(numbers), [-np.inf, *edges, np.inf]
    said = ["", *(f"{edge:+g}" for edge in edges), ""]
    return {
        f"{name}={said[i]}..{said[i + 1]}": (values >= bounds[i]) & (values < bounds[i + 1])
        for i in range(len(bounds) - 1)
    }
