"""From scores to advantages: the KL penalty, rewards per token, and generalised advantage estimation.

Notation: B batch, R padded response length; `response_mask[b, r]` is True for the tokens the policy produced, the EOS
included, and responses start at r = 0.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from rlhf_lightning.functional.masked import last_index

KLEstimator = Literal["k1", "k2", "k3"]


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: KLEstimator = "k1") -> Tensor:
    """Per-token estimate of KL(policy || reference) from one sampled token.

    With d = log pi - log ref: `k1` is d (unbiased, can be negative), `k2` is d^2 / 2 (biased, low variance), `k3` is
    exp(-d) - 1 + d (unbiased, never negative). Source: http://joschu.net/blog/kl-approx.html.

    Args:
        logprobs: log-probabilities under the policy, `[B, R]`, in nats.
        ref_logprobs: log-probabilities under the reference, `[B, R]`, in nats.
        estimator: `k1`, `k2` or `k3`.

    Returns:
        `[B, R]`, in nats.

    Example:
        >>> kl_estimate(torch.tensor([[-1.0]]), torch.tensor([[-3.0]]), "k2")
        tensor([[2.]])
    """
    difference = logprobs - ref_logprobs
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return 0.5 * difference**2
    if estimator == "k3":
        return torch.exp(-difference) - 1 + difference
    raise ValueError(f"estimator {estimator!r} is none of k1, k2 and k3")


def kl_shaped_rewards(
    scores: Tensor, kl: Tensor, response_mask: Tensor, kl_coef: float, dense: Tensor | None = None
) -> Tensor:
    """Reward per token: the KL penalty everywhere, the score on the last token of the response.

    `rewards[b, r] = -kl_coef * kl[b, r] + [r is last] * scores[b]` (Stiennon et al. 2020, section 3.4; Ziegler et al.
    2019, equation 2). A part of the score that is given along the response stands at its tokens, and the last one gets
    what is left: `[r is last] * (scores[b] - sum(dense[b])) + dense[b, r]`.

    Args:
        scores: one score per response, `[B]`.
        kl: per-token KL estimate, `[B, R]`.
        response_mask: `[B, R]`, bool.
        kl_coef: weight of the penalty, per nat.
        dense: the part that is given along the response, `[B, R]`, 0 after the last token; None for none.

    Returns:
        `[B, R]`, 0 after the last token.

    Example:
        >>> mask = torch.tensor([[True, True, False]])
        >>> kl_shaped_rewards(torch.tensor([1.0]), torch.tensor([[1.0, 2.0, 9.0]]), mask, 0.5)
        tensor([[-0.5000,  0.0000,  0.0000]])
    """
    positions = torch.arange(response_mask.shape[1], device=response_mask.device)  # [R]
    is_last = positions == last_index(response_mask).unsqueeze(1)  # [B, R]
    if dense is not None:
        scores = scores - dense.sum(dim=1)
    rewards = -kl_coef * kl + is_last * scores.unsqueeze(1)  # [B, R]
    rewards = rewards if dense is None else rewards + dense
    return torch.where(response_mask, rewards, 0)


def gae(
    rewards: Tensor,
    values: Tensor,
    response_mask: Tensor,
    gamma: float = 1.0,
    gae_lambda: float | Tensor = 0.95,
    value_lambda: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation over the response tokens, with nothing after the last one.

    delta_r = reward_r + gamma * V_{r+1} - V_r and A_r = delta_r + gamma * lambda * A_{r+1}; V and A are 0 past the end
    (Schulman et al. 2016, equations 11 to 16).

    Args:
        rewards: `[B, R]`.
        values: `values[b, r] = V(x[<P+r])`, the value before token r is chosen, `[B, R]`.
        response_mask: `[B, R]`, bool.
        gamma: discount per token.
        gae_lambda: weight between one-step (0) and Monte-Carlo (1) advantages; a number, or one for each response,
            `[B]`.
        value_lambda: the same for the returns (Yuan et al. 2025, VAPO, "decoupled GAE"); None for `gae_lambda`.

    Returns:
        Advantages and returns, both `[B, R]` and 0 after the last token; returns are values plus the advantages by
        `value_lambda`.

    Example:
        >>> mask = torch.tensor([[True, True, False]])
        >>> rewards, values = torch.tensor([[0.0, 1.0, 0.0]]), torch.tensor([[0.5, 0.5, 7.0]])
        >>> advantages, returns = gae(rewards, values, mask, gamma=1.0, gae_lambda=1.0)
        >>> advantages
        tensor([[0.5000, 0.5000, 0.0000]])
        >>> returns
        tensor([[1., 1., 0.]])
    """
    values = torch.where(response_mask, values, 0)  # [B, R]
    next_values = nn.functional.pad(values[:, 1:], (0, 1))  # [B, R]
    delta = torch.where(response_mask, rewards + gamma * next_values - values, 0)  # [B, R]

    def summed(weight: float | Tensor) -> Tensor:
        discount = gamma * weight
        sums = _discounted_sums(delta, discount.unsqueeze(1) if isinstance(discount, Tensor) else discount)
        return torch.where(response_mask, sums, 0)  # [B, R]

    advantages = summed(gae_lambda)
    return advantages, (advantages if value_lambda is None else summed(value_lambda)) + values


def length_adaptive_lambda(response_mask: Tensor, alpha: float) -> Tensor:
    """A GAE lambda for each response, nearer to 1 the longer it is: `1 - 1 / (alpha * length)`, but not below 0.

    So the weights of the errors ahead, `1 + lambda + lambda^2 + ...`, sum to `alpha * length` (Yuan et al. 2025, VAPO,
    equation 9; `alpha` 0.05 there).

    Args:
        response_mask: `[B, R]`, bool.
        alpha: share of a response that an advantage looks ahead.

    Returns:
        `[B]`, float32.

    Example:
        >>> length_adaptive_lambda(torch.tensor([[True] * 4, [True, False, False, False]]), 0.5)
        tensor([0.5000, 0.0000])
    """
    ahead = alpha * response_mask.sum(dim=1).clamp(min=1)  # [B]
    return (1 - 1 / ahead).clamp(min=0)


def _discounted_sums(terms: Tensor, discount: float | Tensor) -> Tensor:
    """`sums[:, r] = terms[:, r] + discount * sums[:, r + 1]`, `[B, R]`.

    In log2(R) operations, each of which doubles how far a sum reaches: a loop over R is thousands of launches on a GPU.
    """
    sums, reach = terms, 1
    while reach < terms.shape[1]:
        further = nn.functional.pad(sums[:, reach:], (0, reach))  # [B, R]
        sums, reach, discount = sums + discount * further, 2 * reach, discount * discount
    return sums
