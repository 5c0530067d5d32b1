"""Weights that ZeRO-3 splits over the processes: the one place that knows how DeepSpeed marks them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def is_sharded(weights: nn.Module | Tensor) -> bool:
    """Whether ZeRO-3 holds a part of each weight only, which cannot be read, copied or merged by itself.

    Args:
        weights: a parameter, or a module, of whose parameters one is enough.
    """
    parameters = weights.parameters() if isinstance(weights, nn.Module) else [weights]
    return any(hasattr(p, "ds_id") for p in parameters)


def full_shape(parameter: Tensor) -> torch.Size:
    """Shape of a parameter on all processes together."""
    return getattr(parameter, "ds_shape", parameter.shape)


def fill_with_zeros(parameter: Tensor) -> None:
    """Set a parameter to 0 in place, or the part of it that this process holds."""
    parts: list[Any] = [parameter, getattr(parameter, "ds_tensor", None)]
    for part in parts:
        if part is not None:
            nn.init.zeros_(part)


@contextmanager
def gathered(*parameters: nn.Parameter) -> Iterator[None]:
    """Hold parameters whole for the length of a `with` block; what rank 0 writes, all ranks receive."""
    if not any(is_sharded(parameter) for parameter in parameters):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=0):
        yield
