"""Best of n of N samples, against every choice of n written out."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_lightning.functional import best_of_n, best_of_n_kl

SCORES = st.lists(st.sampled_from([-1.5, 0.0, 0.25, 2.0, 3.0]), min_size=1, max_size=7)


def by_enumeration(scores: list[float], values: list[float], n: int) -> float:
    """Mean over all choices of n of what the best is worth, those of the same score taken equally often."""
    worth = []
    for chosen in combinations(range(len(scores)), n):
        highest = max(scores[i] for i in chosen)
        best = [values[i] for i in chosen if scores[i] == highest]
        worth.append(sum(best) / len(best))
    return sum(worth) / len(worth)


@given(scores=SCORES, data=st.data())
def test_the_best_of_n_is_the_mean_over_every_choice(scores, data):
    n = data.draw(st.integers(1, len(scores)))
    values = data.draw(st.lists(st.floats(-5, 5), min_size=len(scores), max_size=len(scores)))
    found = best_of_n(torch.tensor(scores), n, torch.tensor(values, dtype=torch.float64))
    assert float(found) == pytest.approx(by_enumeration(scores, values, n), abs=1e-12)
    assert float(best_of_n(torch.tensor(scores), n)) == pytest.approx(by_enumeration(scores, scores, n), abs=1e-12)


def test_prompts_are_looked_at_one_by_one():
    scores = torch.tensor([[1.0, 2.0, 3.0], [30.0, 20.0, 10.0]])
    assert best_of_n(scores, 3).tolist() == [3.0, 30.0]
    assert best_of_n(scores, 1).tolist() == [2.0, 20.0]
    assert best_of_n(scores, 3, -scores.flip(1)).tolist() == [-1.0, -10.0]


def test_many_samples_lose_no_precision():
    scores = torch.arange(2000.0)
    # The expected maximum of n of 0 .. N-1 is n (N + 1) / (n + 1) - 1.
    for n in (1, 64, 1000, 2000):
        assert float(best_of_n(scores, n)) == pytest.approx(n * 2001 / (n + 1) - 1, rel=1e-12)


@pytest.mark.parametrize("n", [0, 4])
def test_more_than_was_drawn_is_refused(n):
    with pytest.raises(ValueError, match=r"from 1 to the number of samples \(3\)"):
        best_of_n(torch.zeros(3), n)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_the_kl_is_that_of_the_best_of_n_over_many_outcomes(n):
    # The best of n has probability (k^n - (k - 1)^n) / K^n of being outcome k of K that are equally likely.
    outcomes = 20_000
    shares = [(k / outcomes) ** n - ((k - 1) / outcomes) ** n for k in range(1, outcomes + 1)]
    exact = sum(p * math.log(p * outcomes) for p in shares if p > 0)
    assert best_of_n_kl(n) == pytest.approx(exact, abs=1e-3)
    assert best_of_n_kl(n) >= exact - 1e-9
