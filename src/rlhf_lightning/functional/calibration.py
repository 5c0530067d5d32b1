"""Whether a reward model's margins mean what they say: of pairs it is 80% sure of, is it right about 80%?

Notation: N pairs, M bins.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Totals = TypeVar("Totals", Tensor, NDArray[np.float64])


class Reliability(NamedTuple):
    """Pairs in bins of equal width by how sure the model is.

    Attributes:
        edges: of the bins, from 0.5 to 1, `[M + 1]`.
        bins: the bin of each pair, `[N]`, int64.
        confidences: how sure the model is of each pair, `[N]`.
        correct: 1 where it prefers the better response, 0.5 where it prefers neither, else 0, `[N]`.
    """

    edges: Tensor
    bins: Tensor
    confidences: Tensor
    correct: Tensor

    @property
    def sums(self) -> Tensor:
        """What each pair adds to its bin: confidence, correctness, and 1; `[N, M, 3]`."""
        parts = torch.stack([self.confidences, self.correct, torch.ones_like(self.correct)], dim=-1)  # [N, 3]
        inside = self.bins.unsqueeze(1) == torch.arange(len(self.edges) - 1, device=self.bins.device)  # [N, M]
        return inside.unsqueeze(2) * parts.unsqueeze(1)


def pair_correct(margins: Tensor) -> Tensor:
    """1 where the better response is scored higher, 0.5 where both are scored alike, else 0; `[N]`.

    Args:
        margins: score of the better response less that of the other, `[N]`.

    Example:
        >>> pair_correct(torch.tensor([2.0, 0.0, -1.0]))
        tensor([1.0000, 0.5000, 0.0000])
    """
    return (margins.sign() + 1) / 2


def reliability(margins: Tensor, num_bins: int = 10) -> Reliability:
    """Bins of pairs by the probability that the model gives to what it prefers, sigmoid(|margin|) (Bradley-Terry).

    Args:
        margins: raw score of the better response less that of the other, `[N]`, float32 or float64.
        num_bins: M; each goes from above its lower edge to its upper one.
    """
    confidences = margins.abs().sigmoid()
    edges = torch.linspace(0.5, 1, num_bins + 1, dtype=margins.dtype, device=margins.device)
    return Reliability(edges, torch.bucketize(confidences, edges[1:-1]), confidences, pair_correct(margins))


def expected_calibration_error(totals: Totals) -> Totals:
    """By how much confidence and accuracy differ, averaged over bins by their pairs (Guo et al. 2017, equation 3).

    Args:
        totals: sums over each bin of confidence, correctness, and weight, `[..., M, 3]`.

    Returns:
        From 0 to 1, `[...]`.

    Example:
        >>> expected_calibration_error(torch.tensor([[0.6, 1.0, 1.0], [2.7, 2.0, 3.0]]))
        tensor(0.2750)
    """
    error: Totals = abs(totals[..., 0] - totals[..., 1]).sum(-1) / totals[..., 2].sum(-1)
    return error
