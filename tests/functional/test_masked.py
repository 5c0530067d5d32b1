"""Sums, means and whitening: what lies under a False is never read."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_lightning.functional import last_index, masked_moments, masked_sum, masked_whiten

NAN, INF = float("nan"), float("inf")
VALUES = torch.tensor([[1.0, 3.0, NAN], [5.0, INF, -INF]])
MASK = torch.tensor([[True, True, False], [True, False, False]])


@st.composite
def masked_rows(draw):
    """Values `[B, R]` and a mask with at least two entries; under False lies NaN."""
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(2, 6))
    size = rows * columns
    values = draw(st.lists(st.floats(-100, 100, width=32), min_size=size, max_size=size))
    kept = draw(st.lists(st.booleans(), min_size=size, max_size=size).filter(lambda m: sum(m) >= 2))
    mask = torch.tensor(kept).view(rows, columns)
    return torch.tensor(values).view(rows, columns).masked_fill(~mask, NAN), mask


def test_sum_mean_and_moments_by_hand():
    assert masked_sum(VALUES, MASK).item() == 9.0
    count, mean, variance = masked_moments(VALUES, MASK)
    assert (count.item(), mean.item()) == (3, 3.0)
    assert variance.item() == pytest.approx((4 + 0 + 4) / 3)


def test_one_entry_is_its_own_mean():
    assert [moment.item() for moment in masked_moments(VALUES[1], MASK[1])] == [1, 5.0, 0.0]


def test_the_mean_of_nothing_is_zero():
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    assert masked_moments(VALUES, nothing)[2].item() == 0.0


def test_whitening_by_hand():
    deviation = math.sqrt(8 / 3)
    expected = torch.tensor([[-2 / deviation, 0.0, 0.0], [2 / deviation, 0.0, 0.0]])
    torch.testing.assert_close(masked_whiten(VALUES, MASK), expected)


def test_whitening_keeps_a_good_response_above_a_bad_one():
    advantages = torch.tensor([[-1.0, -1.0, -1.0], [3.0, 3.0, 0.0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    whitened = masked_whiten(advantages, mask)
    assert (whitened[0] < 0).all()
    assert (whitened[1, :2] > 0).all()
    assert whitened[1, 2] == 0


@given(masked_rows())
def test_whitened_entries_have_mean_0_and_variance_1_over_the_whole_batch(rows):
    values, mask = rows
    whitened = masked_whiten(values, mask)[mask].double()
    assert whitened.mean().item() == pytest.approx(0, abs=1e-3)
    if values[mask].double().var(correction=0) > 1e-2:
        assert whitened.var(correction=0).item() == pytest.approx(1, abs=1e-3)


def test_whitening_equal_values_gives_zeros():
    assert torch.equal(masked_whiten(torch.full((2, 2), 7.0), torch.ones(2, 2, dtype=torch.bool)), torch.zeros(2, 2))


def test_variance_stays_exact_beside_a_large_mean():
    values = torch.tensor([10_000.0, 10_001.0, 10_002.0])
    assert masked_moments(values, torch.ones(3, dtype=torch.bool))[2].item() == pytest.approx(2 / 3, rel=1e-4)


@given(masked_rows(), st.sampled_from([0.0, 1e30, INF, -INF, NAN]))
def test_what_the_mask_hides_never_matters(rows, filler):
    values, mask = rows
    other = values.masked_fill(~mask, filler)
    for function in (masked_sum, masked_whiten, lambda v, m: torch.stack(masked_moments(v, m))):
        assert torch.equal(function(values, mask), function(other, mask))


def test_the_gradient_under_the_mask_is_zero():
    values = VALUES.clone().requires_grad_()
    masked_sum(values, MASK).backward()
    assert torch.equal(values.grad, MASK.float())


@given(masked_rows())
def test_two_processes_whiten_as_one(rows):
    values, mask = rows
    theirs = torch.tensor([2.0, -4.0])
    everything = torch.cat([values[mask], theirs])
    # What the other process adds to each of the sums: count and sum, squares around the common mean.
    squares = ((theirs - everything.mean()) ** 2).sum()
    contributions = iter([torch.stack([torch.tensor(2.0), theirs.sum()]), squares])

    here = masked_whiten(values, mask, reduce=lambda ours: ours + next(contributions))

    together = masked_whiten(everything, torch.ones_like(everything, dtype=torch.bool))
    torch.testing.assert_close(here[mask], together[: mask.sum()], atol=1e-4, rtol=1e-4)


def test_last_index_on_either_padding_side():
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [0, 1, 1], [0, 1, 0], [1, 0, 0], [0, 0, 0]]).bool()
    assert last_index(mask).tolist() == [2, 1, 2, 1, 0, 0]


@given(masked_rows())
def test_whitening_without_a_shift_leaves_the_mean(rows):
    values, mask = rows
    shifted, scaled = masked_whiten(values, mask), masked_whiten(values, mask, shift=False)
    torch.testing.assert_close(scaled[mask], shifted[mask] + values[mask].mean(), atol=1e-4, rtol=1e-4)
    assert not scaled[~mask].any()
