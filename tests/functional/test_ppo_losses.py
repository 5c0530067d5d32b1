"""The clipped losses of PPO, against numbers by hand, plain loops and gradients by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_lightning.functional import ppo_policy_loss, ppo_value_loss

NAN = float("nan")
numbers = st.floats(-3, 3, width=32)


@st.composite
def columns(draw, count):
    """Several tensors `[B, R]` and a mask; under False lies NaN."""
    shape = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    size = shape[0] * shape[1]
    mask = torch.tensor(draw(st.lists(st.booleans(), min_size=size, max_size=size))).view(shape)
    lists = (draw(st.lists(numbers, min_size=size, max_size=size)) for _ in range(count))
    return [torch.tensor(values).view(shape).masked_fill(~mask, NAN) for values in lists], mask


def test_policy_loss_by_hand():
    # Ratios 1.5, 1.5, 0.5, 0.5, 1.1 with advantages of both signs; the last token is hidden.
    ratios = torch.tensor([[1.5, 1.5, 0.5], [0.5, 1.1, NAN]])
    advantages = torch.tensor([[1.0, -1.0, 1.0], [-1.0, 2.0, NAN]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    old = torch.full((2, 3), -1.0)
    loss, metrics = ppo_policy_loss(old + ratios.log(), old, advantages, mask, clip_range=0.2)
    # min(ratio * A, clipped * A): 1.2, -1.5, 0.5, -0.8, 2.2; negated and summed.
    assert loss.item() == pytest.approx(-(1.2 - 1.5 + 0.5 - 0.8 + 2.2))
    assert metrics["ratio"].item() == pytest.approx(1.5 + 1.5 + 0.5 + 0.5 + 1.1)
    assert metrics["clip_fraction"].item() == 2.0
    k3 = sum(r - 1 - math.log(r) for r in (1.5, 1.5, 0.5, 0.5, 1.1))
    assert metrics["approx_kl"].item() == pytest.approx(k3, rel=1e-5)


def test_policy_gradient_by_hand():
    ratios = torch.tensor([[1.5, 1.5, 0.5, 0.5, 1.1, NAN]])
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0, 2.0, NAN]])
    mask = torch.tensor([[True, True, True, True, True, False]])
    logprobs = ratios.log().requires_grad_()
    ppo_policy_loss(logprobs, torch.zeros(1, 6), advantages, mask)[0].backward()
    # d(-A * ratio) / d logprob = -A * ratio where the clip does not bind, else 0.
    expected = torch.tensor([[0.0, 1.5, -0.5, 0.0, -2.2, 0.0]])
    torch.testing.assert_close(logprobs.grad, expected)


def test_at_the_old_policy_the_loss_is_the_policy_gradient():
    logprobs = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    advantages, mask = torch.tensor([[3.0, -4.0]]), torch.ones(1, 2, dtype=torch.bool)
    loss, metrics = ppo_policy_loss(logprobs, logprobs.detach(), advantages, mask)
    loss.backward()
    assert torch.equal(logprobs.grad, -advantages)
    assert {name: metric.item() for name, metric in metrics.items()} == {
        "ratio": 2.0,
        "clip_fraction": 0.0,
        "approx_kl": 0.0,
    }


def test_dual_clip_by_hand():
    # Ratios 5, 5, 2, 0.5 with advantages -1, 1, -1, -1: only the first is above 3 where the advantage is negative.
    ratios, advantages = torch.tensor([[5.0, 5.0, 2.0, 0.5]]), torch.tensor([[-1.0, 1.0, -1.0, -1.0]])
    logprobs, mask = ratios.log().requires_grad_(), torch.ones(1, 4, dtype=torch.bool)
    loss, metrics = ppo_policy_loss(logprobs, torch.zeros(1, 4), advantages, mask, 0.2, dual_clip=3.0)
    assert loss.item() == pytest.approx(3.0 - 1.2 + 2.0 + 0.8)
    assert metrics["clip_fraction"].item() == 3.0
    loss.backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([[0.0, 0.0, 2.0, 0.0]]))


@given(columns(3))
def test_a_dual_clip_that_nothing_reaches_changes_nothing(tensors):
    (new, old, advantages), mask = tensors
    plain, bounded = (ppo_policy_loss(new, old, advantages, mask, 0.2, dual_clip=bound) for bound in (None, 1e6))
    assert torch.equal(plain[0], bounded[0])
    assert {name: value.item() for name, value in plain[1].items()} == {
        name: value.item() for name, value in bounded[1].items()
    }


@given(columns(3), st.floats(0.05, 0.9))
def test_policy_loss_equals_a_loop(tensors, clip):
    (new, old, advantages), mask = tensors
    loss, metrics = ppo_policy_loss(new, old, advantages, mask, clip)
    expected, clipped_tokens = 0.0, 0
    for n, o, a in zip(new[mask].tolist(), old[mask].tolist(), advantages[mask].tolist(), strict=True):
        ratio = math.exp(n - o)
        bounded = min(max(ratio, 1 - clip), 1 + clip)
        expected -= min(ratio * a, bounded * a)
        clipped_tokens += bounded * a < ratio * a
    assert loss.item() == pytest.approx(expected, abs=1e-2, rel=1e-4)
    assert metrics["clip_fraction"].item() == pytest.approx(clipped_tokens, abs=1)


def test_value_loss_by_hand():
    values = torch.tensor([[1.0, 2.0, 0.0], [0.1, NAN, NAN]])
    old_values = torch.tensor([[0.0, 0.0, 0.0], [0.0, NAN, NAN]])
    returns = torch.tensor([[2.0, 0.0, 1.0], [-1.0, NAN, NAN]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    # Clipped values 0.2, 0.2, 0, 0.1. The larger error of each token: 1.8^2, 2^2, 1^2, 1.1^2.
    loss, metrics = ppo_value_loss(values, old_values, returns, mask, clip_range=0.2)
    assert loss.item() == pytest.approx(0.5 * (3.24 + 4.0 + 1.0 + 1.21))
    assert metrics["clip_fraction"].item() == 1.0
    assert torch.equal(ppo_value_loss(values, old_values, returns, mask)[0], loss)  # 0.2 where nothing is said
    unclipped, metrics = ppo_value_loss(values, old_values, returns, mask, clip_range=None)
    assert unclipped.item() == pytest.approx(0.5 * (1.0 + 4.0 + 1.0 + 1.21))
    assert metrics["clip_fraction"].item() == 0.0


@pytest.mark.parametrize(("clip_range", "expected"), [(0.2, [0.0, 2.0, -1.0, 1.1, 0.0]), (None, [-1, 2, -1, 1.1, 0])])
def test_value_gradient_by_hand(clip_range, expected):
    values = torch.tensor([[1.0, 2.0, 0.0, 0.1, NAN]], requires_grad=True)
    old_values = torch.tensor([[0.0, 0.0, 0.0, 0.0, NAN]])
    returns = torch.tensor([[2.0, 0.0, 1.0, -1.0, NAN]])
    mask = torch.tensor([[True, True, True, True, False]])
    ppo_value_loss(values, old_values, returns, mask, clip_range)[0].backward()
    # d/dV of (V - return)^2 / 2 is V - return; 0 where the clipped error is the larger one.
    torch.testing.assert_close(values.grad, torch.tensor([expected], dtype=torch.float32))


@given(columns(3), st.one_of(st.none(), st.floats(0.05, 2)))
def test_value_loss_equals_a_loop(tensors, clip):
    (values, old, returns), mask = tensors
    loss, _ = ppo_value_loss(values, old, returns, mask, clip)
    expected = 0.0
    for v, o, target in zip(values[mask].tolist(), old[mask].tolist(), returns[mask].tolist(), strict=True):
        error = (v - target) ** 2
        if clip is not None:
            error = max(error, (min(max(v, o - clip), o + clip) - target) ** 2)
        expected += error / 2
    assert loss.item() == pytest.approx(expected, abs=1e-3, rel=1e-4)


@given(columns(3))
def test_losses_of_parts_add_up(tensors):
    fields, mask = tensors
    for loss in (ppo_policy_loss, ppo_value_loss):
        whole, metrics = loss(*fields, mask)
        parts = [loss(*(field[row : row + 1] for field in fields), mask[row : row + 1]) for row in range(len(mask))]
        torch.testing.assert_close(sum(part for part, _ in parts), whole, atol=1e-3, rtol=1e-4)
        for name, metric in metrics.items():
            torch.testing.assert_close(sum(part[name] for _, part in parts), metric, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("filler", [NAN, float("inf"), 1e30])
def test_hidden_entries_change_neither_loss_nor_gradient(filler):
    mask = torch.tensor([[True, False]])
    clean = [torch.tensor([[x, 0.0]]) for x in (0.3, 0.1, 0.7)]
    spoilt = [torch.tensor([[x, filler]]) for x in (0.3, 0.1, 0.7)]
    for loss in (ppo_policy_loss, ppo_value_loss, lambda *args: ppo_value_loss(*args, clip_range=None)):
        results = []
        for new, old, target in (clean, spoilt):
            new = new.clone().requires_grad_()
            value, metrics = loss(new, old, target, mask)
            value.backward()
            results.append([value.detach(), new.grad, *metrics.values()])
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)
