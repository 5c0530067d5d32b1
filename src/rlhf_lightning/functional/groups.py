"""Advantages of several responses to one prompt, which judge each by the others instead of by a value model.

Notation: G groups of K responses, B = G * K; the responses of a group stand next to one another.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

Baseline = Literal["mean", "leave_one_out"]

_STD_EPS = 1e-4


def group_advantages(rewards: Tensor, size: int, baseline: Baseline = "mean", scaled: bool = False) -> Tensor:
    """How much better each response is than those of its group.

    Args:
        rewards: one for each response, `[B]`.
        size: K, at least 2.
        baseline: what is subtracted: the `mean` of the group (Shao et al. 2024, GRPO), or that of the others,
            `leave_one_out` (Kool et al. 2019; Ahmadian et al. 2024, RLOO), which keeps the gradient unbiased.
        scaled: then divide by the standard deviation of the group's rewards (with Bessel's correction) + 1e-4. It makes
            groups count alike, whether their rewards differ much or little (criticised by Liu et al. 2025, Dr. GRPO).

    Returns:
        `[B]`.

    Example:
        >>> import torch
        >>> rewards = torch.tensor([1.0, 3.0, 5.0])
        >>> group_advantages(rewards, 3), group_advantages(rewards, 3, "leave_one_out")
        (tensor([-2.,  0.,  2.]), tensor([-3.,  0.,  3.]))
    """
    groups = rewards.view(-1, size)  # [G, K]
    groups = groups - groups[:, :1]  # equal rewards are 0 exactly, whatever the mean rounds to
    advantages = groups - groups.mean(dim=1, keepdim=True)
    if baseline == "leave_one_out":
        advantages = advantages * (size / (size - 1))
    if scaled:
        advantages = advantages / (groups.std(dim=1, keepdim=True) + _STD_EPS)
    return advantages.flatten()


def groups_without_signal(scores: Tensor, size: int) -> Tensor:
    """How many groups got one score for all responses, so that none is better than another; a scalar, int64.

    Args:
        scores: one for each response, `[B]`.
        size: K.
    """
    groups = scores.view(-1, size)
    return (groups == groups[:, :1]).all(dim=1).sum()
