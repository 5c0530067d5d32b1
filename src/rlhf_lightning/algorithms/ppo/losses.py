"""The losses of one PPO micro-batch, a backward pass each, so that only one model's activations are alive at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_lightning.algorithms.ppo.experience import Experience
from rlhf_lightning.algorithms.ppo.models import TrunkValue, logprobs_and_values
from rlhf_lightning.algorithms.ppo.settings import Objective
from rlhf_lightning.functional import masked_sum, ppo_policy_loss, ppo_value_loss
from rlhf_lightning.models.scalar_lm import ScalarLM, response_values

Loss = tuple[Tensor, dict[str, Tensor]]


def ppo_losses(
    policy: PreTrainedModel,
    value: ScalarLM | TrunkValue,
    batch: Experience,
    objective: Objective,
    temperature: float,
    on_policy: bool = False,
) -> Iterator[Loss]:
    """Policy loss and weighted value loss; computed when asked for, in one piece where both share the trunk.

    Args:
        policy: the policy.
        value: the value model, or a head on the policy's hidden states.
        batch: responses of the old policy.
        objective: clipping and weights.
        temperature: the sampling temperature.
        on_policy: the policy is still the one that answered, so its own log-probabilities, detached, are the old ones.
            Then `ratio` and `approx_kl` compare them with what the sampler said, and `entropy` is reported too.

    Yields:
        A loss summed over response tokens, a scalar, and sums to be logged.
    """
    rows = batch.sequences, batch.sequence_mask, batch.response_mask
    trunk = value if isinstance(value, TrunkValue) else None
    logprobs, entropies, values = logprobs_and_values(policy, trunk, *rows, temperature, with_entropy=on_policy)
    loss, metrics = _policy_loss(logprobs, batch, objective, on_policy)
    if on_policy:
        metrics["entropy"] = masked_sum(entropies.detach(), batch.response_mask)
    if not isinstance(value, TrunkValue):
        yield loss, metrics
        del loss, logprobs, entropies  # the graph is gone before the next one is built
        values = response_values(value, *rows)
        loss, metrics = torch.zeros((), device=values.device), {}
    value_loss, stats = ppo_value_loss(
        values, batch.values, batch.returns, batch.response_mask, objective.value_clip_range
    )
    metrics |= {"value_loss": value_loss.detach(), "value_clip_fraction": stats["clip_fraction"]}
    yield loss + objective.value_coef * value_loss, metrics


def tallied(losses: Iterator[Loss], sums: dict[str, Tensor]) -> Iterator[Tensor]:
    """The losses alone.

    Args:
        losses: of a micro-batch.
        sums: what is to be logged of each loss is added to these as it comes.
    """
    for loss, metrics in losses:
        sums |= {name: sums.get(name, 0) + value for name, value in metrics.items()}
        yield loss


def _policy_loss(logprobs: Tensor, batch: Experience, objective: Objective, on_policy: bool) -> Loss:
    old, fixed = batch.logprobs, (batch.advantages, batch.response_mask, objective.clip_range)
    loss, stats = ppo_policy_loss(logprobs, logprobs.detach() if on_policy else old, *fixed)
    if on_policy:
        _, stats = ppo_policy_loss(logprobs.detach(), old, *fixed)
    return loss, {
        "policy_loss": loss.detach(),
        "ratio": stats["ratio"],
        "approx_kl": stats["approx_kl"],
        "clip_fraction": stats["clip_fraction"],
    }
