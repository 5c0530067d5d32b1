"""Best-of-n: what the best of n samples is worth, and how far taking it moves a policy.

Notation: N samples of one prompt, n of which are looked at.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def best_of_n(scores: Tensor, n: int, values: Tensor | None = None) -> Tensor:
    """What the best-scored of n samples is worth, averaged over every choice of n out of the N that were drawn.

    So one sampling run serves all n, without bias (Nakano et al. 2021, WebGPT, appendix I; Gao et al. 2022). A sample
    of which `le` score no higher and `lt` lower is among those that may win with probability
    `(C(le, n) - C(lt, n)) / C(N, n)`, which it shares with those of the same score.

    Args:
        scores: what the best is chosen by, `[..., N]`.
        n: samples to choose from, from 1 to N.
        values: what the chosen one is worth, `[..., N]`; None for its score.

    Returns:
        `[...]`, float64.

    Raises:
        ValueError: fewer samples than n, or n below 1.

    Example:
        >>> best_of_n(torch.tensor([3.0, 1.0, 2.0]), 2)  # of {3, 1}, {3, 2} and {1, 2}
        tensor(2.6667, dtype=torch.float64)
    """
    total = scores.shape[-1]
    if not 1 <= n <= total:
        raise ValueError(f"n ({n}) must be from 1 to the number of samples ({total})")
    choices = math.comb(total, n)
    # Integers of Python divide exactly, however large they are.
    share = torch.tensor([math.comb(k, n) / choices for k in range(total + 1)], dtype=torch.float64)  # [N + 1]
    scores = scores.detach().double().cpu().contiguous()
    ordered = scores.sort(dim=-1).values.contiguous()
    below = torch.searchsorted(ordered, scores)  # [..., N]
    not_above = torch.searchsorted(ordered, scores, right=True)
    weights = (share[not_above] - share[below]) / (not_above - below)
    return (weights * (scores if values is None else values.detach().double().cpu())).sum(dim=-1)


def best_of_n_kl(n: int) -> float:
    """KL of best-of-n to the policy that the samples come from, nats: `log n - (n - 1) / n`.

    Exact where no two samples score the same, and above the truth otherwise (Beirami et al. 2024).

    Args:
        n: samples to choose from.

    Example:
        >>> round(best_of_n_kl(1), 3), round(best_of_n_kl(64), 3)
        (0.0, 3.175)
    """
    return math.log(n) - (n - 1) / n
