"""Numbers of rows, some of which are none."""

from __future__ import annotations

import pytest

from rlhf_lightning.evaluation.statistics import result


def test_rows_without_a_finite_number_are_left_out_and_counted():
    with pytest.warns(UserWarning, match="kl_k1 of m: 2 of 4 rows have no finite number and are left out"):
        found = result("kl_k1", "m", [(1.0, 1), (None, 1), (float("inf"), 1), (3.0, 1)], seed=0)
    assert (found.value, found.count) == (2.0, 2)


def test_nothing_finite_gives_no_number():
    with pytest.warns(UserWarning, match="2 of 2 rows"):
        assert result("kl_k1", "m", [(float("nan"), 1), (1, float("nan"))], seed=0) is None
