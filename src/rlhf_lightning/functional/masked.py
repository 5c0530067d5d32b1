"""Sums, means and whitening over the entries that count.

Notation: B batch, T padded length. A mask is boolean, True means "counts". What lies under a False is never read, so
NaN or infinity there does no harm.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over all processes; the identity on one process."""


def identity(x: Tensor) -> Tensor:
    """Return `x`: the reduction over a single process."""
    return x


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum of the entries that count.

    Args:
        values: any shape.
        mask: True where the entry counts, the same shape, bool.

    Returns:
        A scalar.

    Example:
        >>> masked_sum(torch.tensor([1.0, float("nan")]), torch.tensor([True, False]))
        tensor(1.)
    """
    return torch.where(mask, values, 0).sum()


def masked_moments(values: Tensor, mask: Tensor, reduce: Reduce = identity) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and population variance of the entries that count, over all processes.

    Args:
        values: any shape.
        mask: True where the entry counts, the same shape, bool.
        reduce: sums a tensor over all processes.

    Returns:
        Count, mean and variance, three scalars, the same on every process. The variance is taken around the global
        mean in a second pass, which stays exact where the mean is large against the deviation.
    """
    total = masked_sum(values, mask)
    dtype = torch.promote_types(total.dtype, torch.float32)  # which counts exactly up to 2^24
    count, total = reduce(torch.stack([mask.sum().to(dtype), total.to(dtype)]))
    count = count.clamp(min=1)
    mean = total / count
    variance = reduce(masked_sum((values - mean) ** 2, mask)) / count
    return count, mean, variance


def masked_whiten(
    values: Tensor, mask: Tensor, eps: float = 1e-8, reduce: Reduce = identity, shift: bool = True
) -> Tensor:
    """Shift to mean 0 and scale to unit variance over every entry that counts, on all processes together.

    Whitening each row by itself would erase the difference between a good and a bad response, so there is no `dim`.

    Args:
        values: any shape.
        mask: True where the entry counts, the same shape, bool.
        eps: added to the variance.
        reduce: sums a tensor over all processes.
        shift: False leaves the mean as it is.

    Returns:
        Whitened values, 0 where the mask is False.

    Example:
        >>> masked_whiten(torch.tensor([1.0, 3.0, 9.0]), torch.tensor([True, True, False]))
        tensor([-1.,  1.,  0.])
    """
    _, mean, variance = masked_moments(values, mask, reduce)
    whitened = (values - mean) * torch.rsqrt(variance + eps)
    return torch.where(mask, whitened if shift else whitened + mean, 0)


def last_index(mask: Tensor) -> Tensor:
    """Position of the last entry that counts in each row.

    Args:
        mask: True where the entry counts, `[B, T]`, bool; any padding side.

    Returns:
        `[B]`, int64. 0 for a row without any entry.

    Example:
        >>> last_index(torch.tensor([[True, True, False], [False, False, True]]))
        tensor([1, 2])
    """
    positions = torch.arange(mask.shape[1], device=mask.device)  # [T]
    return torch.where(mask, positions, 0).amax(dim=1)  # [B]
