"""How far two measurements of the same things go together.

Notation: N things.
"""

from __future__ import annotations

from torch import Tensor


def correlation(x: Tensor, y: Tensor) -> float:
    """Pearson's correlation coefficient, in float64; 0 where either does not vary.

    Args:
        x: `[N]`.
        y: `[N]`.

    Example:
        >>> import torch
        >>> round(correlation(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 3.0, 2.0])), 6)
        0.5
    """
    if len(x) < 2:
        return 0.0
    x, y = x.double() - x.double().mean(), y.double() - y.double().mean()
    size = float((x.square().sum() * y.square().sum()).sqrt())
    return float((x * y).sum()) / size if size else 0.0
