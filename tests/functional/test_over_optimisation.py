"""Curves of score against distance: exact where the data follow them, and nearest where they do not."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_lightning.functional import GaoFit, fit_gao

D = torch.tensor([0.0, 0.5, 1.0, 2.0, 4.0, 7.0])


@pytest.mark.parametrize(
    ("form", "score"),
    [
        ("best_of_n", [0.0, 0.5 * (2 - 0.15), 2 - 0.3, 2 * (2 - 0.6), 4 * (2 - 1.2), 7 * (2 - 2.1)]),
        ("rl", [0.0, *(d * (2 - 0.3 * math.log(d)) for d in D.tolist()[1:])]),
    ],
)
def test_a_curve_of_the_form_is_found_again(form, score):
    fit = fit_gao(D, torch.tensor(score), form)
    assert (fit.alpha, fit.beta, fit.r2) == pytest.approx((2, 0.3, 1), abs=1e-5)
    torch.testing.assert_close(fit.predict(D), torch.tensor(score, dtype=torch.float64), atol=1e-5, rtol=0)


@pytest.mark.parametrize("form", ["best_of_n", "rl"])
def test_the_peak_is_where_the_curve_is_highest(form):
    fit = GaoFit(form, alpha=1.3, beta=0.4, r2=1.0)
    around = fit.peak + torch.tensor([-0.01, 0.0, 0.01])
    assert fit.predict(around).argmax() == 1


def test_a_curve_that_never_falls_has_no_peak():
    assert GaoFit("rl", 1.0, 0.0, 1.0).peak == math.inf
    assert GaoFit("best_of_n", 1.0, -0.1, 1.0).peak == math.inf


def test_no_other_curve_is_nearer():
    score = torch.tensor([0.1, 0.9, 1.8, 2.0, 1.0, -2.0]).double()

    def miss(alpha: float, beta: float) -> float:
        return float(((GaoFit("rl", alpha, beta, 0.0).predict(D) - score) ** 2).sum())

    fit = fit_gao(D, score, "rl")
    for alpha, beta in ((0.01, 0), (-0.01, 0), (0, 0.01), (0, -0.01)):
        assert miss(fit.alpha + alpha, fit.beta + beta) > miss(fit.alpha, fit.beta)
    assert fit.r2 == pytest.approx(1 - miss(fit.alpha, fit.beta) / float(((score - score.mean()) ** 2).sum()))


def test_points_that_leave_the_curve_open_are_refused():
    with pytest.raises(ValueError, match="two different distances"):
        fit_gao(torch.tensor([0.0, 2.0, 2.0]), torch.tensor([0.0, 1.0, 1.5]), "rl")
