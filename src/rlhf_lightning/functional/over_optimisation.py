"""How a true score rises and falls as a policy is optimised against a stand-in for it (Gao et al. 2022).

With d the square root of the KL to where the policy started, in nats, a score, counted from that of the start, follows
`d (alpha - beta d)` for best-of-n and `d (alpha - beta log d)` for reinforcement learning (section 3.1).
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

GaoForm = Literal["best_of_n", "rl"]


class GaoFit(NamedTuple):
    """A curve of score against the distance that a policy has moved.

    Attributes:
        form: `best_of_n` for `d (alpha - beta d)`, `rl` for `d (alpha - beta log d)`.
        alpha: how steeply the score rises, per square root of a nat.
        beta: how much optimisation spoils.
        r2: share of the variance of the scores that the curve explains; below 0 where a constant does better.
    """

    form: GaoForm
    alpha: float
    beta: float
    r2: float

    def predict(self, distance: Tensor) -> Tensor:
        """The score at each distance, counted from that at distance 0.

        Args:
            distance: square root of the KL, any shape.
        """
        return _terms(self.form, distance.double()) @ torch.tensor([self.alpha, self.beta], dtype=torch.float64)

    @property
    def peak(self) -> float:
        """The distance at which the score is highest; infinite where it never falls."""
        if self.beta <= 0:
            return math.inf
        ratio = self.alpha / self.beta
        if self.form == "best_of_n":
            return max(0.0, ratio / 2)
        return math.exp(min(ratio - 1, 700.0))


def fit_gao(distance: Tensor, score: Tensor, form: GaoForm) -> GaoFit:
    """The curve of one of the two forms nearest to measured scores, by linear least squares in alpha and beta.

    Args:
        distance: square root of the KL to the start, `[K]`, not negative.
        score: counted from that of the start, `[K]`.
        form: which.

    Raises:
        ValueError: fewer than two different distances above 0, which leave the curve open.

    Example:
        >>> d = torch.tensor([0.0, 1.0, 2.0, 4.0])
        >>> fit = fit_gao(d, d * (3 - 0.5 * d), "best_of_n")
        >>> round(fit.alpha, 6), round(fit.beta, 6), round(fit.peak, 6)
        (3.0, 0.5, 3.0)
    """
    distance, score = distance.double(), score.double()
    if len(distance[distance > 0].unique()) < 2:
        raise ValueError("a curve needs two different distances above 0")
    terms = _terms(form, distance)
    found = torch.linalg.lstsq(terms, score.unsqueeze(1)).solution.squeeze(1)  # [2]
    spread = float(((score - score.mean()) ** 2).sum())
    left = float(((score - terms @ found) ** 2).sum())
    return GaoFit(form, float(found[0]), float(found[1]), 1 - left / spread if spread > 0 else 0.0)


def _terms(form: GaoForm, distance: Tensor) -> Tensor:
    """What alpha and beta are multiplied by, `[..., 2]`."""
    if form == "best_of_n":
        return torch.stack([distance, -(distance**2)], dim=-1)
    return torch.stack([distance, -torch.xlogy(distance, distance)], dim=-1)  # 0 at 0
