"""The policy loss that PPO, RLOO and GRPO have in common, for one micro-batch.

Notation: B batch, R padded response length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_lightning.algorithms.online.experience import Experience
from rlhf_lightning.algorithms.stage import Loss
from rlhf_lightning.functional import ppo_policy_loss


def clipped_policy_loss(
    logprobs: Tensor,
    batch: Experience,
    clip_range: float,
    clip_range_high: float | None = None,
    dual_clip: float | None = None,
    *,
    on_policy: bool = False,
    weights: Tensor | None = None,
    per_response: bool = False,
) -> Loss:
    """The clipped surrogate, a sum over response tokens or responses, and sums over tokens to be logged.

    Args:
        logprobs: under the policy being trained, `[B, R]`.
        batch: responses of the old policy, with their advantages, and how much each token weighs where something else
            than that policy has drawn it.
        clip_range: how far the probability ratio may move from 1.
        clip_range_high: how far upwards, where that differs (Yu et al. 2025, DAPO); None for `clip_range`.
        dual_clip: what the ratio counts as at most where the advantage is negative (Ye et al. 2020); None for no bound.
        on_policy: the policy is still the one that answered, so its own log-probabilities, detached, are the old ones;
            what is logged compares them with what the sampler said.
        weights: of each token in the loss, `[B, R]`; None for 1.
        per_response: a response is one action with one probability ratio and one advantage (Ahmadian et al. 2024).
    """
    mask = batch.response_mask
    clip = clip_range, clip_range_high or clip_range, dual_clip
    old = logprobs.detach() if on_policy else batch.logprobs
    advantages = batch.advantages * batch.importance
    if per_response:
        sums, old_sums = (torch.where(mask, some, 0).sum(dim=1, keepdim=True) for some in (logprobs, old))  # [B, 1]
        loss, _ = ppo_policy_loss(sums, old_sums, advantages[:, :1], mask[:, :1], *clip)
    else:
        advantages = advantages if weights is None else advantages * weights
        loss, stats = ppo_policy_loss(logprobs, old, advantages, mask, *clip)
    if per_response or on_policy:
        _, stats = ppo_policy_loss(logprobs.detach(), batch.logprobs, batch.advantages, mask, *clip)
    return loss, {"policy_loss": loss.detach(), **stats}
