"""Weights for tokens that another distribution than the policy's has drawn.

Notation: B batch, R padded response length.
"""

from __future__ import annotations

import torch
from torch import Tensor


def truncated_importance(
    logprobs: Tensor, sampler_logprobs: Tensor, mask: Tensor, cap: float, per_response: bool = False
) -> Tensor:
    r"""Truncated importance weights: $\min(\pi / q, c)$ (Ionides 2008; for samplers in RL: Yao et al. 2025, TIS).

    An inference engine computes with kernels, and perhaps in a type, of its own, so that what it draws follows a
    distribution $q$ near the policy's $\pi$. An estimate over its draws, weighted by $\pi / q$, is one over the
    policy's; the cap bounds its variance and costs a little bias.

    Args:
        logprobs: under the policy, `[B, R]`, nats.
        sampler_logprobs: under what drew the tokens, `[B, R]`, nats.
        mask: True for response tokens, `[B, R]`, bool.
        cap: the largest weight, above 0.
        per_response: one weight for all tokens of a response, of the ratio of its whole probability.

    Returns:
        `[B, R]`, 1 where the mask is False; no gradient.

    Example:
        >>> policy, sampler = torch.tensor([[0.25, 0.9]]).log(), torch.tensor([[0.5, 0.3]]).log()
        >>> truncated_importance(policy, sampler, torch.ones(1, 2, dtype=torch.bool), cap=2.0)
        tensor([[0.5000, 2.0000]])
    """
    ratios = torch.where(mask, logprobs.detach() - sampler_logprobs, 0)
    if per_response:
        ratios = torch.where(mask, ratios.sum(dim=1, keepdim=True), 0)
    return ratios.exp().clamp(max=cap)
