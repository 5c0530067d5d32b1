"""Weights that ZeRO-3 splits over the processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


def is_partitioned(model: nn.Module) -> bool:
    """Whether ZeRO-3 holds a part of each weight only, which cannot be read, copied or merged by itself."""
    return any(hasattr(p, "ds_id") for p in model.parameters())


@contextmanager
def whole(*weights: nn.Parameter) -> Iterator[None]:
    """Hold weights whole for the length of a `with` block; what the first process writes, all processes receive."""
    if not any(hasattr(weight, "ds_id") for weight in weights):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(weights), modifier_rank=0):
        yield
