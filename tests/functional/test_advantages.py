"""The KL penalty, rewards per token, and generalised advantage estimation."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_lightning.functional import gae, kl_estimate, kl_shaped_rewards, length_adaptive_lambda, masked_whiten

NAN = float("nan")


@st.composite
def episodes(draw):
    """Rewards and values `[B, R]`, response lengths from 1 to R."""
    rows, columns = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    numbers = st.lists(st.floats(-10, 10, width=32), min_size=rows * columns, max_size=rows * columns)
    lengths = draw(st.lists(st.integers(1, columns), min_size=rows, max_size=rows))
    rewards, values = (torch.tensor(draw(numbers)).view(rows, columns) for _ in range(2))
    return rewards, values, lengths


def mask_of(lengths, columns):
    return torch.arange(columns) < torch.tensor(lengths).unsqueeze(1)


def plain_gae(rewards, values, gamma, lam):
    """The definition: A_r is the sum over l of (gamma * lambda)^l * delta_{r+l}, one response without padding."""
    steps = len(rewards)
    values = [*values, 0.0]
    deltas = [rewards[r] + gamma * values[r + 1] - values[r] for r in range(steps)]
    return [sum((gamma * lam) ** (s - r) * deltas[s] for s in range(r, steps)) for r in range(steps)]


def test_kl_estimates_by_hand():
    logprobs, ref = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -1.0]])
    torch.testing.assert_close(kl_estimate(logprobs, ref), torch.tensor([[0.5, -1.0]]))
    torch.testing.assert_close(kl_estimate(logprobs, ref, "k2"), torch.tensor([[0.125, 0.5]]))
    expected = torch.tensor([[math.exp(-0.5) - 1 + 0.5, math.exp(1.0) - 1 - 1.0]])
    torch.testing.assert_close(kl_estimate(logprobs, ref, "k3"), expected)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_the_expected_estimate_is_the_kl_divergence(estimator):
    policy, reference = torch.tensor([0.1, 0.2, 0.7]), torch.tensor([0.3, 0.3, 0.4])
    divergence = (policy * (policy / reference).log()).sum()
    expected = (policy * kl_estimate(policy.log(), reference.log(), estimator)).sum()
    torch.testing.assert_close(expected, divergence)


@given(st.floats(-20, 0), st.floats(-20, 0))
def test_k2_and_k3_are_never_negative_and_all_vanish_at_equality(logprob, ref):
    pair = torch.tensor([logprob]), torch.tensor([ref])
    assert kl_estimate(*pair, "k2") >= 0
    assert kl_estimate(*pair, "k3") >= -1e-6
    for estimator in ("k1", "k2", "k3"):
        assert kl_estimate(pair[0], pair[0], estimator).item() == 0


def test_the_score_arrives_with_the_last_token():
    mask = torch.tensor([[True, True, True], [True, True, False], [True, False, False]])  # full, ended, only EOS
    kl = torch.tensor([[1.0, -2.0, 3.0], [1.0, 1.0, NAN], [4.0, NAN, NAN]])
    rewards = kl_shaped_rewards(torch.tensor([10.0, 20.0, 30.0]), kl, mask, kl_coef=0.5)
    assert rewards.tolist() == [[-0.5, 1.0, 8.5], [-0.5, 19.5, 0.0], [28.0, 0.0, 0.0]]


def test_rewards_lie_where_their_inputs_do():
    mask = torch.ones(2, 3, dtype=torch.bool, device="meta")
    rewards = kl_shaped_rewards(torch.zeros(2, device="meta"), torch.zeros(2, 3, device="meta"), mask, kl_coef=0.5)
    assert rewards.device.type == "meta"


@given(episodes(), st.floats(0, 1))
def test_rewards_sum_to_score_minus_weighted_kl(episode, kl_coef):
    kl, scores, lengths = episode[0], episode[1][:, 0], episode[2]
    mask = mask_of(lengths, kl.shape[1])
    rewards = kl_shaped_rewards(scores, kl.masked_fill(~mask, NAN), mask, kl_coef)
    expected = scores - kl_coef * (kl * mask).sum(dim=1)
    torch.testing.assert_close(rewards.sum(dim=1), expected, atol=1e-4, rtol=1e-4)


def test_gae_by_hand():
    mask = torch.tensor([[True, True, True], [True, True, False], [True, False, False]])
    rewards = torch.tensor([[0.0, 1.0, 2.0], [0.0, 4.0, NAN], [5.0, NAN, NAN]])
    values = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 100.0], [2.0, NAN, NAN]])
    # gamma 0.5, lambda 0.5: delta = r + V'/2 - V and A = delta + A'/4.
    # Row 0: deltas 0+1-1=0, 1+1.5-2=0.5, 2-3=-1; A2=-1, A1=0.5-0.25=0.25, A0=0.0625.
    # Row 1: deltas 0+1-1=0, 4-2=2 (nothing after the last token); A1=2, A0=0.5. Row 2: A0=5-2=3.
    advantages, returns = gae(rewards, values, mask, gamma=0.5, gae_lambda=0.5)
    assert advantages.tolist() == [[0.0625, 0.25, -1.0], [0.5, 2.0, 0.0], [3.0, 0.0, 0.0]]
    assert returns.tolist() == [[1.0625, 2.25, 2.0], [1.5, 4.0, 0.0], [5.0, 0.0, 0.0]]


def test_gae_undiscounted_with_lambda_095_where_nothing_is_said():
    rewards, values, mask = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5, 0.25]]), torch.ones(1, 2, dtype=torch.bool)
    advantages, _ = gae(rewards, values, mask)
    torch.testing.assert_close(advantages, torch.tensor([[0.75 + 0.95 * 1.75, 1.75]]))


@given(episodes(), st.floats(0, 1), st.floats(0, 1))
def test_gae_equals_the_double_sum_of_its_definition(episode, gamma, lam):
    rewards, values, lengths = episode
    mask = mask_of(lengths, rewards.shape[1])
    hidden = rewards.masked_fill(~mask, NAN), values.masked_fill(~mask, NAN)
    advantages, returns = gae(*hidden, mask, gamma, lam)
    for row, length in enumerate(lengths):
        expected = plain_gae(rewards[row, :length].tolist(), values[row, :length].tolist(), gamma, lam)
        assert advantages[row, :length].tolist() == pytest.approx(expected, abs=1e-3)
        both = [a + v for a, v in zip(expected, values[row, :length].tolist(), strict=True)]
        assert returns[row, :length].tolist() == pytest.approx(both, abs=1e-3)
        assert not advantages[row, length:].any()
        assert not returns[row, length:].any()


@given(episodes(), st.floats(0, 1))
def test_lambda_1_is_monte_carlo(episode, gamma):
    rewards, values, lengths = episode
    _, returns = gae(rewards, values, mask_of(lengths, rewards.shape[1]), gamma, gae_lambda=1.0)
    for row, length in enumerate(lengths):
        discounted = [sum(gamma ** (s - r) * rewards[row, s].item() for s in range(r, length)) for r in range(length)]
        assert returns[row, :length].tolist() == pytest.approx(discounted, abs=1e-3)


@given(episodes(), st.floats(0, 1))
def test_lambda_0_is_the_one_step_error(episode, gamma):
    rewards, values, lengths = episode
    mask = mask_of(lengths, rewards.shape[1])
    values = values * mask
    following = torch.cat([values[:, 1:], torch.zeros(len(values), 1)], dim=1)
    advantages, _ = gae(rewards, values, mask, gamma, gae_lambda=0.0)
    torch.testing.assert_close(advantages, (rewards + gamma * following - values) * mask, atol=1e-4, rtol=1e-4)


@given(episodes(), st.integers(1, 3))
def test_more_padding_changes_nothing(episode, extra):
    rewards, values, lengths = episode
    columns = rewards.shape[1]
    wider = torch.full((len(lengths), extra), NAN)
    short = gae(rewards, values, mask_of(lengths, columns))
    long = gae(torch.cat([rewards, wider], 1), torch.cat([values, wider], 1), mask_of(lengths, columns + extra))
    for a, b in zip(short, long, strict=True):
        assert torch.equal(a, b[:, :columns])
        assert not b[:, columns:].any()


def test_a_better_score_gives_a_better_advantage_to_every_token():
    mask = torch.ones(2, 10, dtype=torch.bool)
    rewards = kl_shaped_rewards(torch.tensor([0.1, 5.0]), torch.zeros(2, 10), mask, kl_coef=0.05)
    for lam in (0.95, 1.0):
        advantages = masked_whiten(gae(rewards, torch.zeros(2, 10), mask, 1.0, lam)[0], mask)
        assert (advantages[1] > advantages[0]).all()
    assert (advantages[0] < 0).all()
    assert (advantages[1] > 0).all()


def test_an_unknown_estimator_is_none_of_the_known_ones():
    with pytest.raises(ValueError, match="estimator 'k4' is none of k1, k2 and k3"):
        kl_estimate(torch.zeros(1, 1), torch.zeros(1, 1), "k4")


def test_values_may_have_a_lambda_of_their_own_and_each_response_one():
    mask = torch.tensor([[True, True, True], [True, True, False]])
    rewards = torch.tensor([[0.0, 1.0, 2.0], [0.0, 4.0, NAN]])
    values = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 100.0]])
    # gamma 0.5: deltas 0, 0.5, -1 and 0, 2. Lambda 0.5 in the first row, 0 in the second; 1 for the returns, which are
    # then the discounted rewards: 0.5 * 1 + 0.25 * 2 = 1, 1 + 1 = 2, 2; and 0.5 * 4 = 2, 4.
    lambdas = torch.tensor([0.5, 0.0])
    advantages, returns = gae(rewards, values, mask, gamma=0.5, gae_lambda=lambdas, value_lambda=1.0)
    assert advantages.tolist() == [[0.0625, 0.25, -1.0], [0.0, 2.0, 0.0]]
    assert returns.tolist() == [[1.0, 2.0, 2.0], [2.0, 4.0, 0.0]]


@given(episodes(), st.floats(0, 1), st.floats(0, 1))
def test_one_lambda_for_all_is_one_for_each(episode, gamma, lam):
    rewards, values, lengths = episode
    mask = mask_of(lengths, rewards.shape[1])
    apart = gae(rewards, values, mask, gamma, torch.full((len(rewards),), lam), value_lambda=lam)
    for ours, together in zip(apart, gae(rewards, values, mask, gamma, lam), strict=True):
        torch.testing.assert_close(ours, together, atol=1e-4, rtol=1e-4)


def test_lambda_by_length():
    mask = mask_of([1, 4, 100], 100)
    # 1 - 1 / (0.5 * 4) and 1 - 1 / (0.5 * 100); one token looks ahead at nothing.
    torch.testing.assert_close(length_adaptive_lambda(mask, 0.5), torch.tensor([0.0, 0.5, 0.98]))
    # The weights of the errors ahead sum to alpha times the length.
    lam = length_adaptive_lambda(mask, 0.5)[2].item()
    assert sum(lam**step for step in range(10_000)) == pytest.approx(50, rel=1e-4)
