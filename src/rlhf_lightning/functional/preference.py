"""Losses of direct preference optimisation, one value for each pair; the caller sums and divides.

Notation: B pairs.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

DPOLoss = Literal["sigmoid", "robust", "hinge", "ipo"]


def dpo_loss(
    chosen: Tensor, rejected: Tensor, kind: DPOLoss = "sigmoid", beta: float = 0.1, label_smoothing: float = 0.0
) -> Tensor:
    """How far a policy is from preferring the chosen response of each pair as it should.

    With h the difference of the two log-ratios and e the label smoothing:

    * `sigmoid`: `-(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)` (Rafailov et al. 2023, equation 7; with e, the
      share of pairs that are the wrong way round, Mitchell 2023, "A note on DPO with noisy preferences").
    * `robust`: `(-(1 - e) log sigmoid(beta h) + e log sigmoid(-beta h)) / (1 - 2 e)`, unbiased under such pairs
      (Chowdhury et al. 2024, equation 12).
    * `hinge`: `max(0, 1 - beta h)` (Zhao et al. 2023, SLiC).
    * `ipo`: `(h - 1 / (2 beta))^2` (Azar et al. 2023, equation 17, beta being its tau).

    Args:
        chosen: log-ratio of the chosen response to the reference, in nats, `[B]`.
        rejected: the same of the rejected response, `[B]`.
        kind: which loss.
        beta: weight of the KL to the reference, per nat.
        label_smoothing: e, from 0 to below 0.5; `hinge` and `ipo` know none.

    Returns:
        `[B]`.

    Example:
        >>> import torch
        >>> dpo_loss(torch.tensor([2.0]), torch.tensor([-3.0]), "ipo", beta=0.1)
        tensor([0.])
    """
    lead = chosen - rejected
    if kind == "ipo":
        return (lead - 1 / (2 * beta)) ** 2
    if kind == "hinge":
        return (1 - beta * lead).clamp(min=0)
    right, wrong = -F.logsigmoid(beta * lead), -F.logsigmoid(-beta * lead)
    if kind == "robust":
        return ((1 - label_smoothing) * right - label_smoothing * wrong) / (1 - 2 * label_smoothing)
    return (1 - label_smoothing) * right + label_smoothing * wrong
