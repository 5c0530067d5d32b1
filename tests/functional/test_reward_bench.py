"""RewardBench 2's scores, worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from rlhf_lightning.functional.reward_bench import best_of_credit, ties_credit


@pytest.mark.parametrize(
    ("correct", "wrong", "credit"),
    [(3, [1, 2, 0], 1), (1, [1, 0, 0], 1 / 2), (1, [1, 1, 1], 1 / 4), (1, [2, 0, 0], 0), (1, [2, 1, 1], 0)],
)
def test_responses_in_the_first_place_share_the_credit(correct, wrong, credit):
    assert best_of_credit(np.array([correct]), np.array(wrong)) == credit


@pytest.mark.parametrize(
    ("correct", "wrong", "credits"),
    [
        ([3, 2], [1.5, 0], (1, 0)),  # gap 0.5, spread 1
        ([3, 2.8], [1.5, 0], (1, 1)),
        ([2, 2], [1, 0], (1, 1)),  # equal scores are spread by nothing
        ([3, 1], [1, 0], (0, 0)),  # the worst correct one is level with a wrong one
        ([3, 0], [1, 2], (0, 0)),
    ],
)
def test_correct_responses_lie_above_wrong_ones_and_close_together(correct, wrong, credits):
    assert ties_credit(np.array(correct), np.array(wrong)) == credits
