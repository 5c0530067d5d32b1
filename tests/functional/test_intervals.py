"""Intervals against what is known of them: the normal approximation, ratios, and the seed."""

from __future__ import annotations

import numpy as np
import pytest

from rlhf_lightning.functional.intervals import bootstrap_interval


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution():
    values = np.random.default_rng(1).normal(3, 2, 2000)
    low, high = bootstrap_interval(np.stack([values, np.ones(2000)], axis=1))
    half = 1.96 * values.std() / np.sqrt(2000)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)


def test_the_interval_of_a_ratio_draws_rows_not_tokens():
    # Rows of one nat per token and rows of two: all the doubt lies in which rows are drawn, however many their tokens.
    tokens = np.tile([10.0, 1000.0], 50)
    sums = np.stack([tokens * np.tile([1.0, 2.0], 50), tokens], axis=1)
    low, high = bootstrap_interval(sums, lambda totals: np.exp(totals[:, 0] / totals[:, 1]))
    assert low < np.exp(sums[:, 0].sum() / sums[:, 1].sum()) < high
    assert high - low > 0.03


def test_what_is_drawn_depends_on_the_seed_alone(monkeypatch):
    sums = np.random.default_rng(0).random((50, 2)) + 1
    interval = bootstrap_interval(sums, seed=3)
    assert interval == bootstrap_interval(sums, seed=3)
    assert interval != bootstrap_interval(sums, seed=4)
    monkeypatch.setattr("rlhf_lightning.functional.intervals._COUNTS_AT_ONCE", 1000)
    assert interval == bootstrap_interval(sums, seed=3)  # however many are drawn at once


@pytest.mark.parametrize("rows", [0, 1])
def test_one_row_says_nothing_of_others(rows):
    assert bootstrap_interval(np.ones((rows, 2))) is None


def test_samples_without_what_is_divided_by_are_passed_over():
    low, high = bootstrap_interval(np.array([[1.0, 1.0], [0.0, 0.0]]))
    assert (low, high) == (1.0, 1.0)
