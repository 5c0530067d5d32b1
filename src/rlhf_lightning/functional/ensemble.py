"""One score of those of several heads, which agree where they have learnt and differ where they guess.

Notation: K heads.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

ScoreCombination = Literal["mean", "min", "mean_minus_std"]


def combine_scores(scores: Tensor, how: ScoreCombination = "mean") -> Tensor:
    """What a response is worth by several opinions, the last two of which are careful ones.

    * `mean`: their mean.
    * `min`: the lowest of them (Coste et al. 2024, "Reward Model Ensembles Help Mitigate Overoptimization", worst-case
      optimisation).
    * `mean_minus_std`: their mean less their standard deviation; the same paper takes a share of the variance, which is
      not in units of the scores.

    Args:
        scores: of the heads, `[..., K]`.
        how: one of these.

    Returns:
        `[...]`.

    Example:
        >>> import torch
        >>> scores = torch.tensor([1.0, 1.0, 4.0, 4.0])
        >>> [combine_scores(scores, how).item() for how in ("mean", "min", "mean_minus_std")]
        [2.5, 1.0, 1.0]
    """
    if how == "mean":
        return scores.mean(dim=-1)
    if how == "min":
        return scores.amin(dim=-1)
    if how != "mean_minus_std":
        raise ValueError(f"{how!r} is none of mean, min and mean_minus_std")
    return scores.mean(dim=-1) - disagreement(scores)


def disagreement(scores: Tensor) -> Tensor:
    """Standard deviation of the scores that heads give, `[...]`, K in its denominator.

    Args:
        scores: of the heads, `[..., K]`.
    """
    return scores.std(dim=-1, correction=0)
