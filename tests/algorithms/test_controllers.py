"""The KL coefficient and the scale of the scores, by hand and against numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_lightning.algorithms.online.controllers import KLController, RunningMoments

numbers = st.floats(-1000, 1000, width=32)


def test_without_a_target_the_weight_is_fixed():
    controller = KLController(coef=0.05)
    controller.update(kl=1000.0, samples=512)
    assert controller.coef == 0.05


def test_adaptive_weight_by_hand():
    controller = KLController(coef=0.15, target=6.0, horizon=10_000)
    controller.update(kl=6.6, samples=500)  # error 0.1
    assert controller.coef == pytest.approx(0.15 * (1 + 0.1 * 500 / 10_000))
    controller.update(kl=60.0, samples=1000)  # error 9, clipped to 0.2
    assert controller.coef == pytest.approx(0.15 * 1.005 * 1.02)
    controller.update(kl=-1.0, samples=1000)  # clipped to -0.2
    assert controller.coef == pytest.approx(0.15 * 1.005 * 1.02 * 0.98)
    controller.update(kl=6.0, samples=1000)
    assert controller.coef == pytest.approx(0.15 * 1.005 * 1.02 * 0.98)


def test_the_horizon_counts_samples_not_updates():
    few, many = (KLController(coef=0.1, target=6.0, horizon=10_000) for _ in range(2))
    few.update(kl=12.0, samples=10_000)
    for _ in range(100):
        many.update(kl=12.0, samples=100)
    assert few.coef == pytest.approx(0.12)
    assert many.coef == pytest.approx(0.12, rel=0.02)


@given(st.lists(st.lists(numbers, min_size=1, max_size=6), min_size=1, max_size=5))
def test_moments_are_those_of_all_values_together(batches):
    moments = RunningMoments()
    for batch in batches:
        moments.update(torch.tensor(batch))
    everything = np.concatenate([np.asarray(batch, dtype=np.float64) for batch in batches])
    assert moments.count == len(everything)
    assert moments.mean == pytest.approx(everything.mean(), abs=1e-6)
    assert moments.variance == pytest.approx(everything.var(), abs=1e-5)


def test_moments_stay_exact_beside_a_large_mean():
    moments = RunningMoments()
    for batch in ([10_000.0, 10_001.0], [10_002.0]):
        moments.update(torch.tensor(batch))
    assert moments.std == pytest.approx((2 / 3) ** 0.5, rel=1e-6)


@given(st.lists(numbers, min_size=1, max_size=6), st.lists(numbers, min_size=1, max_size=6))
def test_two_processes_update_alike(ours, theirs):
    other, everything = (torch.tensor(x, dtype=torch.float64) for x in (theirs, ours + theirs))
    # What the other process adds to each of the sums: count and sum, squares around the common mean.
    squares = ((other - everything.mean()) ** 2).sum()
    contributions = iter([torch.stack([torch.ones_like(other).sum(), other.sum()]), squares])
    here, together = RunningMoments(), RunningMoments()
    here.update(torch.tensor(ours), reduce=lambda x: x + next(contributions))
    together.update(everything)
    assert (here.count, here.mean) == pytest.approx((together.count, together.mean), abs=1e-6)
    assert here.variance == pytest.approx(together.variance, abs=1e-5)


def test_scaling_by_what_was_seen():
    moments = RunningMoments()
    assert moments.std == 1.0
    assert moments.scale(torch.tensor([3.0])).tolist() == [3.0]
    moments.update(torch.tensor([5.0, 5.0]))
    assert moments.scale(torch.tensor([6.0])).tolist() == [1.0]  # no spread yet: only shifted
    moments.update(torch.tensor([1.0, 9.0]))  # 5, 5, 1, 9: mean 5, variance 8
    assert moments.scale(torch.tensor([9.0])).tolist() == pytest.approx([4 / 8**0.5])


@pytest.mark.parametrize("score", [0.1, -3.3, 1e5])
def test_rounding_is_never_blown_up_to_a_score(score):
    moments = RunningMoments()
    moments.update(torch.tensor([score] * 7))
    moments.update(torch.tensor([score * (1 + 1e-7)] * 3))
    assert not moments.has_spread
    assert moments.scale(torch.tensor([score, score * (1 + 1e-7)])).abs().max() < 0.1
    moments.update(torch.tensor([score * (1 + 1e-4)] * 3))  # little, but more than rounding
    assert moments.has_spread
    assert moments.scale(torch.tensor([score, score * (1 + 1e-4)])).diff().abs() > 1
