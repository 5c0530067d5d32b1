"""Calibration against scikit-learn's curve, and against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.calibration import calibration_curve

from rlhf_lightning.functional.calibration import expected_calibration_error, pair_correct, reliability


def logit(p: float) -> float:
    return float(np.log(p / (1 - p)))


def test_the_curve_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.5, 1, 3000)
    margins = np.log(confidence / (1 - confidence)) * np.where(rng.random(3000) < confidence**2, 1, -1)
    totals = reliability(torch.from_numpy(margins)).sums.sum(dim=0).numpy()
    ours = totals[:, 1] / totals[:, 2], totals[:, 0] / totals[:, 2]
    sigmoid = 1 / (1 + np.exp(-np.abs(margins)))
    theirs = calibration_curve(margins > 0, sigmoid, n_bins=20)  # of which those below 0.5 are empty
    np.testing.assert_allclose(ours, theirs, rtol=1e-12)


def test_the_error_is_as_worked_out_by_hand():
    # Three pairs of 0.62, one of them wrong; one of 0.9 that is right: bins 0.60-0.65 and 0.85-0.90.
    margins = np.array([logit(0.62), logit(0.62), -logit(0.62), logit(0.899)])
    error = expected_calibration_error(reliability(torch.from_numpy(margins)).sums.sum(dim=0))
    assert error.item() == pytest.approx((abs(3 * 0.62 - 2) + abs(0.899 - 1)) / 4)


def test_a_model_that_is_right_as_often_as_it_is_sure_has_no_error():
    margins = np.array([logit(0.75)] * 3 + [-logit(0.75)])
    error = expected_calibration_error(reliability(torch.from_numpy(margins)).sums.sum(dim=0))
    assert error.item() == pytest.approx(0)


def test_ties_count_half_and_lie_in_the_first_bin():
    found = reliability(torch.zeros(2))
    assert (found.bins.tolist(), found.correct.tolist()) == ([0, 0], [0.5, 0.5])
    assert expected_calibration_error(found.sums.sum(dim=0)) == 0


def test_margins_beyond_all_measure_are_sure():
    found = reliability(torch.tensor([1e4, -1e4]))
    assert (found.bins.tolist(), pair_correct(torch.tensor([1e4, -1e4])).tolist()) == ([9, 9], [1, 0])
    assert found.confidences.tolist() == [1, 1]
