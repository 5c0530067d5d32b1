"""What online algorithms remember between iterations besides weights: the KL coefficient and the scale of scores."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_lightning.functional.masked import Reduce, identity, masked_moments

_ROUNDING = 1e-6
"""Share of their size by which float32 numbers that went through a few operations may differ for no reason."""


@dataclass
class KLController:
    """The weight of the KL penalty, fixed or adapted to hold a target.

    `coef *= 1 + clip(kl / target - 1, -0.2, 0.2) * samples / horizon` (Ziegler et al. 2019, section 2.2).

    Args:
        coef: the weight, per nat.
        target: KL per response to hold, in nats; None keeps the weight fixed.
        horizon: number of samples over which the weight moves by at most about 20%.

    Example:
        >>> controller = KLController(coef=0.1, target=6.0, horizon=100)
        >>> controller.update(kl=60.0, samples=10)
        >>> round(controller.coef, 4)
        0.102
    """

    coef: float
    target: float | None = None
    horizon: int = 10_000

    def update(self, kl: float, samples: int) -> None:
        """Adapt to one rollout.

        Args:
            kl: mean KL per response, in nats.
            samples: responses in the rollout, over all ranks.
        """
        if self.target is None:
            return
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.coef *= 1 + error * samples / self.horizon


@dataclass
class RunningMoments:
    """Mean and variance of everything seen so far (Chan et al. 1979, the parallel update).

    Example:
        >>> moments = RunningMoments()
        >>> moments.update(torch.tensor([1.0, 3.0])); moments.update(torch.tensor([5.0]))
        >>> moments.mean, round(moments.std, 4)
        (3.0, 1.633)
    """

    count: float = 0.0
    mean: float = 0.0
    variance: float = 0.0

    @property
    def has_spread(self) -> bool:
        """Whether the values differ by more than the rounding of float32, 1e-7 of their size."""
        return self.variance > _ROUNDING**2 * (self.mean**2 + self.variance)

    @property
    def std(self) -> float:
        """Population standard deviation; 1 where there is no spread, so that rounding is never blown up to a score."""
        return self.variance**0.5 if self.has_spread else 1.0

    def update(self, values: Tensor, reduce: Reduce = identity) -> None:
        """Take in new values.

        Args:
            values: any shape; this rank's share.
            reduce: sums a tensor over all ranks.
        """
        values = values.double()
        moments = masked_moments(values, torch.ones_like(values, dtype=torch.bool), reduce)
        count, mean, variance = torch.stack([m.double() for m in moments]).tolist()
        total = self.count + count
        delta = mean - self.mean
        self.variance = (self.variance * self.count + variance * count + delta**2 * self.count * count / total) / total
        self.mean += delta * count / total
        self.count = total

    def scale(self, values: Tensor) -> Tensor:
        """Shift to mean 0 and scale to standard deviation 1 by what was seen so far, any shape."""
        return (values - self.mean) / self.std
