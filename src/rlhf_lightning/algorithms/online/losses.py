"""The policy loss that PPO, RLOO and GRPO have in common, for one micro-batch.

Notation: B batch, R padded response length.
"""

from __future__ import annotations

from torch import Tensor

from rlhf_lightning.algorithms.online.experience import Experience
from rlhf_lightning.algorithms.stage import Loss
from rlhf_lightning.functional import ppo_policy_loss


def clipped_policy_loss(
    logprobs: Tensor,
    batch: Experience,
    clip_range: float,
    clip_range_high: float | None = None,
    on_policy: bool = False,
    weights: Tensor | None = None,
) -> Loss:
    """The clipped surrogate, a sum over response tokens, and sums to be logged.

    Args:
        logprobs: under the policy being trained, `[B, R]`.
        batch: responses of the old policy, with their advantages.
        clip_range: how far the probability ratio may move from 1.
        clip_range_high: how far upwards, where that differs (Yu et al. 2025, DAPO); None for `clip_range`.
        on_policy: the policy is still the one that answered, so its own log-probabilities, detached, are the old ones;
            what is logged compares them with what the sampler said.
        weights: of each token in the loss, `[B, R]`; None for 1.
    """
    old, mask = batch.logprobs, batch.response_mask
    advantages = batch.advantages if weights is None else batch.advantages * weights
    loss, stats = ppo_policy_loss(
        logprobs, logprobs.detach() if on_policy else old, advantages, mask, clip_range, clip_range_high
    )
    if on_policy:
        _, stats = ppo_policy_loss(logprobs.detach(), old, advantages, mask, clip_range, clip_range_high)
    return loss, {
        "policy_loss": loss.detach(),
        "ratio": stats["ratio"],
        "approx_kl": stats["approx_kl"],
        "clip_fraction": stats["clip_fraction"],
    }
