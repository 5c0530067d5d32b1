"""Rankings from comparisons, against scikit-learn's logistic regression of the same likelihood."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from rlhf_lightning.functional import bradley_terry, length_controlled_win_rate

WINS = torch.tensor(
    [
        [0.0, 7.0, 5.5, 2.0],
        [3.0, 0.0, 6.0, 1.0],
        [4.5, 4.0, 0.0, 0.0],
        [8.0, 2.0, 9.0, 0.0],
    ]
)


def by_logistic_regression(wins: torch.Tensor, draws: float = 0.0) -> np.ndarray:
    """Strengths with mean 0; `draws` of weight against one more model, whose strength is fixed at 0."""
    count = len(wins)
    rows, outcomes, weights = [], [], []
    for i in range(count):
        for j in range(count):
            if i != j and wins[i, j] > 0:
                row = np.zeros(count)
                row[i], row[j] = 1, -1
                for sign, outcome in ((1, 1), (-1, 0)):  # the same game seen from both sides, half each
                    rows.append(sign * row)
                    outcomes.append(outcome)
                    weights.append(float(wins[i, j]) / 2)
        for outcome in (0, 1) if draws else ():
            row = np.zeros(count)
            row[i] = 1
            rows.append(row)
            outcomes.append(outcome)
            weights.append(draws / 2)
    model = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-10, max_iter=10_000)
    strengths = model.fit(np.array(rows), outcomes, sample_weight=weights).coef_[0]
    return strengths - strengths.mean()


def test_strengths_are_those_of_maximum_likelihood():
    np.testing.assert_allclose(bradley_terry(WINS), by_logistic_regression(WINS), atol=1e-5)


def test_the_prior_changes_nothing_where_there_is_a_maximum():
    assert torch.equal(bradley_terry(WINS, prior=1.0), bradley_terry(WINS, prior=50.0))


def test_a_model_that_never_loses_is_held_by_a_draw():
    wins = WINS.clone()
    wins[:3, 3] = 0
    strength = bradley_terry(wins, prior=2.0)
    np.testing.assert_allclose(strength, by_logistic_regression(wins, draws=2.0), atol=1e-5)
    assert strength.argmax() == 3
    assert strength.isfinite().all()


def test_models_that_never_met_are_ranked_through_the_draw():
    wins = torch.zeros(4, 4)
    wins[0, 1], wins[1, 0], wins[2, 3] = 3, 1, 4
    strength = bradley_terry(wins)
    assert strength[0] > strength[1]
    assert strength[2] > strength[3]
    assert float(strength.mean()) == pytest.approx(0, abs=1e-9)


def test_tables_are_ranked_one_by_one():
    beaten = WINS.clone()
    beaten[:3, 3] = 0
    both = bradley_terry(torch.stack([WINS, beaten, torch.zeros(4, 4)]))
    for found, table in zip(both, (WINS, beaten, torch.zeros(4, 4)), strict=True):
        torch.testing.assert_close(found, bradley_terry(table), atol=1e-8, rtol=0)


def test_a_model_that_was_never_judged_stands_in_the_middle():
    assert bradley_terry(torch.zeros(3, 3)).tolist() == [0, 0, 0]


def test_games_against_oneself_are_left_out():
    assert torch.equal(bradley_terry(WINS), bradley_terry(WINS + 5 * torch.eye(4)))


def outcomes_and_lengths() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(3)
    mine, theirs = rng.integers(5, 60, 200), rng.integers(5, 40, 200)
    longer = np.tanh((mine - theirs) / np.std(mine - theirs))
    wins = (rng.random(200) < 1 / (1 + np.exp(0.8 - 2 * longer))).astype(float)
    wins[::10] = 0.5
    return torch.tensor(wins), torch.tensor(mine), torch.tensor(theirs)


def test_the_length_controlled_win_rate_is_the_constant_of_a_logistic_regression():
    wins, mine, theirs = outcomes_and_lengths()
    difference = (mine - theirs).double()
    terms = np.stack([np.ones(200), torch.tanh(difference / difference.std(correction=0)).numpy()], axis=1)
    model = LogisticRegression(C=1 / 0.01, fit_intercept=False, tol=1e-10, max_iter=10_000)
    both = np.concatenate([terms, terms]), np.repeat([1, 0], 200)
    model.fit(*both, sample_weight=np.concatenate([wins.numpy(), 1 - wins.numpy()]))
    expected = 1 / (1 + np.exp(-model.coef_[0][0]))
    assert length_controlled_win_rate(wins, mine, theirs) == pytest.approx(expected, abs=1e-5)
    assert expected < float(wins.mean()) - 0.1


def test_exchanging_the_sides_turns_the_rate_round():
    wins, mine, theirs = outcomes_and_lengths()
    rate = length_controlled_win_rate(wins, mine, theirs)
    assert length_controlled_win_rate(1 - wins, theirs, mine) == pytest.approx(1 - rate)


def test_one_that_always_wins_keeps_a_finite_rate():
    rate = length_controlled_win_rate(torch.ones(20), torch.arange(20), torch.arange(20).flip(0))
    assert 0.95 < rate < 1


@pytest.mark.parametrize("by", [0, 7])
def test_without_differences_in_length_the_rate_is_the_plain_one(by):
    lengths = torch.tensor([3, 9, 4, 5])
    assert length_controlled_win_rate(torch.tensor([1.0, 1.0, 0.5, 0.0]), lengths + by, lengths) == 0.625
