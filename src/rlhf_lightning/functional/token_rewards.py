"""Scores along a response as rewards of its tokens.

Notation: B batch, R padded response length.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

PerToken = Literal["score", "difference"]


def rewards_along(scores: Tensor, places: Tensor, kind: PerToken) -> Tensor:
    """Rewards of tokens from the scores of all beginnings of a response.

    * `score`: at each place the score of what was said up to there, as of a process reward model that judges steps
      (Lightman et al. 2023, "Let's Verify Step by Step"; Wang et al. 2024, Math-Shepherd).
    * `difference`: at each place what that score has gained since the place before, or since 0 before the first. This
      is the score at the end plus potential-based shaping by the scores before it, which changes no optimal policy
      (Ng et al. 1999, theorem 1; with gamma 1, and potential 0 before the first token), so that the sum is the score at
      the last place.

    Args:
        scores: of each response up to and with each token, `[B, R]`.
        places: where there are rewards, `[B, R]`, bool.
        kind: one of these.

    Returns:
        `[B, R]`, 0 elsewhere.

    Example:
        >>> scores, places = torch.tensor([[1.0, 4.0, 6.0]]), torch.tensor([[True, False, True]])
        >>> rewards_along(scores, places, "score"), rewards_along(scores, places, "difference")
        (tensor([[1., 0., 6.]]), tensor([[1., 0., 5.]]))
    """
    if kind == "score":
        return torch.where(places, scores, 0)
    if kind != "difference":
        raise ValueError(f"{kind!r} is neither score nor difference")
    positions = torch.arange(places.shape[1], device=places.device)  # [R]
    last = torch.where(places, positions, -1).cummax(dim=1).values  # [B, R], the last place up to here
    before = nn.functional.pad(last[:, :-1], (1, 0), value=-1)  # [B, R]
    gained_from = torch.where(before >= 0, scores.gather(1, before.clamp(min=0)), 0)  # [B, R]
    return torch.where(places, scores - gained_from, 0)
