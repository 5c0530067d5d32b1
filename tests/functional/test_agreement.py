"""Cohen's kappa by hand and against scikit-learn."""

from __future__ import annotations

import math
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score

from rlhf_lightning.functional import cohen_kappa


def test_by_hand():
    # Both yes 20, first alone 5, second alone 10, both no 15: p = 35 / 50, c = (25 * 30 + 25 * 20) / 2500 = 0.5.
    first = ["yes"] * 25 + ["no"] * 25
    second = ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15
    assert cohen_kappa(first, second) == pytest.approx(0.4)


def test_it_is_not_defined_without_anything_to_tell_apart():
    assert cohen_kappa([], []) is None
    assert cohen_kappa(["a", "a"], ["a", "a"]) is None


@given(pairs=st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from("abcd")), min_size=1, max_size=30))
def test_as_scikit_learn(pairs):
    first, second = zip(*pairs, strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = cohen_kappa_score(first, second)
    kappa = cohen_kappa(first, second)
    assert (kappa is None) == math.isnan(expected)
    assert kappa is None or kappa == pytest.approx(expected)
