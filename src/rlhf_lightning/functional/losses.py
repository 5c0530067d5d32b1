"""The losses of the three stages, as sums or per-pair values; the caller divides by the global count.

A loss here never averages: the number of valid tokens (or pairs) of the whole minibatch, over all micro-batches and
ranks, is known only to the module. Notation: B batch, T padded length, R padded response length, N selected tokens,
V vocabulary.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_lightning.functional.masked import last_index, masked_sum

RewardLoss = Literal["last_token", "average", "per_sample"]
RewardObjective = Literal["logistic", "hinge"]


def cross_entropy_sum(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Summed next-token cross-entropy in nats.

    Args:
        logits: predictions for the targets, `[N, V]`, any float type.
        targets: `[N]`, int64.
        label_smoothing: share of the target spread evenly over the vocabulary (Szegedy et al. 2016, section 7).

    Returns:
        A scalar, float32.

    Example:
        >>> cross_entropy_sum(torch.zeros(3, 4), torch.tensor([0, 1, 2]))
        tensor(4.1589)
    """
    return F.cross_entropy(logits.float(), targets, reduction="sum", label_smoothing=label_smoothing)


def divergence_index(chosen_ids: Tensor, rejected_ids: Tensor, chosen_mask: Tensor, rejected_mask: Tensor) -> Tensor:
    """First position where the two sequences of a pair differ, by id or because one has ended.

    Args:
        chosen_ids: `[B, T]`, int64, padded on the right.
        rejected_ids: `[B, T]`, int64, padded on the right.
        chosen_mask: `[B, T]`, bool.
        rejected_mask: `[B, T]`, bool.

    Returns:
        `[B]`, int64; 0 for identical sequences.

    Example:
        >>> both = torch.tensor([[True, True, True]])
        >>> divergence_index(torch.tensor([[5, 6, 7]]), torch.tensor([[5, 8, 7]]), both, both)
        tensor([1])
    """
    differ = (chosen_mask != rejected_mask) | ((chosen_ids != rejected_ids) & chosen_mask)  # [B, T]
    return differ.int().argmax(dim=1)


def scores_at_end(token_scores: Tensor, mask: Tensor) -> Tensor:
    """The score of each sequence: the scalar head at its last real token.

    Args:
        token_scores: `[B, T]`.
        mask: True for real tokens, `[B, T]`, bool.

    Returns:
        `[B]`.

    Example:
        >>> scores_at_end(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[True, True, False]]))
        tensor([2.])
    """
    return token_scores.gather(1, last_index(mask).unsqueeze(1)).squeeze(1)


def _mean_from(token_scores: Tensor, mask: Tensor, start: Tensor) -> Tensor:
    # A side that ends where the other goes on (a prefix) has no token of its own; its last one stands for it.
    start = torch.minimum(start, last_index(mask)).unsqueeze(1)  # [B, 1]
    positions = torch.arange(mask.shape[1], device=mask.device)  # [T]
    own = mask & (positions >= start)  # [B, T]
    return torch.where(own, token_scores, 0).sum(dim=1) / own.sum(dim=1)


def _hold_last(token_scores: Tensor, mask: Tensor) -> Tensor:
    positions = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)  # [B, T]
    return token_scores.gather(1, torch.minimum(positions, last_index(mask).unsqueeze(1)))


def lead_loss(lead: Tensor, objective: RewardObjective = "logistic", label_smoothing: float = 0.0) -> Tensor:
    """What the lead of a chosen score over a rejected one costs.

    * `logistic`: `-(1 - e) log sigmoid(lead) - e log sigmoid(-lead)`, e being the label smoothing: with 0 that of
      Bradley and Terry (1952), else for data of which a share e is the wrong way round (Mitchell 2023, "A note on DPO
      with noisy preferences"). It is least at a lead of `log((1 - e) / e)`.
    * `hinge`: `max(0, 1 - lead)` (Joachims 2002, ranking by support vectors): pairs that are 1 apart teach nothing.

    Args:
        lead: any shape, in units of the scores.
        objective: `logistic` or `hinge`.
        label_smoothing: e, from 0 to below 0.5; `hinge` knows none.

    Returns:
        Of the shape of `lead`.

    Example:
        >>> lead_loss(torch.tensor([-0.5, 0.75, 2.0]), "hinge")
        tensor([1.5000, 0.2500, 0.0000])
    """
    if objective == "hinge":
        if label_smoothing:
            raise ValueError(f"label_smoothing ({label_smoothing}) is for logistic, and the objective is hinge")
        return (1 - lead).clamp(min=0)
    if objective != "logistic":
        raise ValueError(f"objective {objective!r} is none of logistic and hinge")
    right = -F.logsigmoid(lead)
    return (1 - label_smoothing) * right - label_smoothing * F.logsigmoid(-lead) if label_smoothing else right


def center_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """How far the two scores of a pair are from being 0 on average: `(chosen + rejected)^2`.

    A loss of differences leaves open where scores lie; a little of this one settles it (Eisenstein et al. 2023,
    "Helping or Herding? Reward Model Ensembles Mitigate but do not Eliminate Reward Hacking").

    Args:
        chosen: score of the chosen side, any shape.
        rejected: the same of the rejected side.

    Returns:
        Of that shape.

    Example:
        >>> center_loss(torch.tensor([2.0, 1.5]), torch.tensor([-2.0, 0.5]))
        tensor([0., 4.])
    """
    return (chosen + rejected) ** 2


def pairwise_loss(
    chosen_scores: Tensor,
    rejected_scores: Tensor,
    chosen_ids: Tensor,
    rejected_ids: Tensor,
    chosen_mask: Tensor,
    rejected_mask: Tensor,
    kind: RewardLoss = "last_token",
    margins: Tensor | None = None,
    objective: RewardObjective = "logistic",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Bradley-Terry loss `-log sigmoid(chosen - rejected - margin)` of each pair, or another one of that lead.

    `last_token` compares the scores at each side's last real token (Stiennon et al. 2020, section 3.4). `average`
    compares the means over each side's real tokens from the first difference on. `per_sample` averages the loss over
    the positions from the first difference to the longer side's end, the shorter side holding its last score (Yao et
    al. 2023, DeepSpeed-Chat).

    Args:
        chosen_scores: per-token scores, `[B, T]`.
        rejected_scores: per-token scores, `[B, T]`.
        chosen_ids: `[B, T]`, int64, padded on the right.
        rejected_ids: `[B, T]`, int64, padded on the right.
        chosen_mask: True for real tokens, `[B, T]`, bool.
        rejected_mask: True for real tokens, `[B, T]`, bool.
        kind: `last_token`, `average` or `per_sample`.
        margins: by how much the chosen score must lead, `[B]`, in units of the scores (Touvron et al. 2023, Llama 2,
            section 3.2.2); None for 0. `per_sample` asks for it at every position.
        objective: what a lead costs, see `lead_loss`.
        label_smoothing: likewise.

    Returns:
        `[B]`, float32.
    """
    rejected_scores = rejected_scores.float()
    if margins is not None:  # asking for a lead is the same as raising the other side
        rejected_scores = rejected_scores + margins.float().unsqueeze(1)
    chosen_scores = chosen_scores.float()
    if kind == "last_token":
        lead = scores_at_end(chosen_scores, chosen_mask) - scores_at_end(rejected_scores, rejected_mask)  # [B]
        return lead_loss(lead, objective, label_smoothing)
    start = divergence_index(chosen_ids, rejected_ids, chosen_mask, rejected_mask)  # [B]
    if kind == "average":
        lead = _mean_from(chosen_scores, chosen_mask, start) - _mean_from(rejected_scores, rejected_mask, start)  # [B]
        return lead_loss(lead, objective, label_smoothing)
    if kind != "per_sample":
        raise ValueError(f"kind {kind!r} is none of last_token, average and per_sample")
    lead = _hold_last(chosen_scores, chosen_mask) - _hold_last(rejected_scores, rejected_mask)  # [B, T]
    losses = lead_loss(lead, objective, label_smoothing)
    positions = torch.arange(chosen_mask.shape[1], device=chosen_mask.device)  # [T]
    compared = (positions >= start.unsqueeze(1)) & (chosen_mask | rejected_mask)  # [B, T]
    return torch.where(compared, losses, 0).sum(dim=1) / compared.sum(dim=1)


def ppo_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    clip_range: float = 0.2,
    clip_range_high: float | None = None,
    dual_clip: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped surrogate loss, summed over the response tokens (Schulman et al. 2017, equation 7, negated).

    Args:
        logprobs: under the policy being trained, `[B, R]`.
        old_logprobs: under the policy that generated, `[B, R]`.
        advantages: `[B, R]`.
        response_mask: `[B, R]`, bool.
        clip_range: the ratio is clipped to `[1 - clip_range, 1 + clip_range]`.
        clip_range_high: replaces the second of them (Yu et al. 2025, DAPO, section 3.1); None for the same.
        dual_clip: where the advantage is negative, the ratio counts as this at most (Ye et al. 2020, equation 5); above
            1. None for no such bound.

    Returns:
        The summed loss, a scalar, and sums over tokens of `ratio`, `clip_fraction` and `approx_kl` (the k3 estimate of
        KL(old || new)).
    """
    # Under the mask False both are arbitrary; a masked difference keeps exp() finite, also in the backward pass.
    log_ratio = torch.where(response_mask, logprobs - old_logprobs, 0)  # [B, R]
    ratio = log_ratio.exp()
    unclipped = -advantages * ratio
    highest = 1 + (clip_range if clip_range_high is None else clip_range_high)
    clipped = -advantages * ratio.clamp(1 - clip_range, highest)
    losses, clips = torch.maximum(unclipped, clipped), clipped > unclipped
    if dual_clip is not None:
        bound = -advantages * dual_clip
        bounded = (advantages < 0) & (losses > bound)
        losses, clips = torch.where(bounded, bound, losses), clips | bounded
    loss = masked_sum(losses, response_mask)
    with torch.no_grad():
        metrics = {
            "ratio": masked_sum(ratio, response_mask),
            "clip_fraction": masked_sum(clips.float(), response_mask),
            "approx_kl": masked_sum(ratio - 1 - log_ratio, response_mask),
        }
    return loss, metrics


def ppo_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, response_mask: Tensor, clip_range: float | None = 0.2
) -> tuple[Tensor, dict[str, Tensor]]:
    """Half the squared error of the values, summed over the response tokens, clipped around the old values.

    Args:
        values: under the value model being trained, `[B, R]`.
        old_values: at the time of the rollout, `[B, R]`.
        returns: `[B, R]`.
        response_mask: `[B, R]`, bool.
        clip_range: values may move this far from the old ones; None for no clipping (OpenAI baselines PPO2; kept by
            Stiennon et al. 2020 and Huang et al. 2024).

    Returns:
        The summed loss, a scalar, and the sum over tokens of `clip_fraction`.
    """
    # As above: what lies under a False must not reach the gradient either.
    values, returns = torch.where(response_mask, values, 0), torch.where(response_mask, returns, 0)
    error = (values - returns) ** 2  # [B, R]
    if clip_range is None:
        return 0.5 * masked_sum(error, response_mask), {"clip_fraction": torch.zeros_like(error).sum()}
    near_old = old_values + (values - old_values).clamp(-clip_range, clip_range)  # [B, R]
    clipped_error = (near_old - returns) ** 2
    loss = 0.5 * masked_sum(torch.maximum(error, clipped_error), response_mask)
    with torch.no_grad():
        metrics = {"clip_fraction": masked_sum((clipped_error > error).float(), response_mask)}
    return loss, metrics
