"""How large the checkpoints of a run will be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn
from torch.optim import Optimizer

from rlhf_lightning.training.optim import can_fuse
from rlhf_lightning.training.sharded import full_shape

_STATE_OF_ADAM = 2.0


def checkpoint_size(module: pl.LightningModule) -> int:
    """Bytes of a checkpoint: the weights that are trained, and what the optimizer holds for each of them.

    Args:
        module: its models loaded; `optimizer`, if it has one, makes the optimizer from parameters.
    """
    state = state_per_weight(getattr(module, "optimizer", None))
    size = 0.0
    for weight in module.parameters():
        if weight.requires_grad:
            short = weight.element_size() < 4
            # Weights in low precision are trained as float32 copies, which are saved too, as is their state.
            each = weight.element_size() + (4 * (state + 1) if short else weight.element_size() * state)
            size += full_shape(weight).numel() * each
    return int(size)


def state_per_weight(make_optimizer: Callable[[Any], Optimizer] | None) -> float:
    """Numbers that an optimizer keeps for each number it trains, found by letting it train a few.

    Args:
        make_optimizer: makes it from parameters.
    """
    weight = nn.Parameter(torch.zeros(16, 16))
    if (optimizer := _stepped(make_optimizer, weight)) is None:
        return _STATE_OF_ADAM
    state = optimizer.state[weight].values()
    tensors = [value for value in state if isinstance(value, torch.Tensor) and value.dim()]
    return sum(tensor.numel() for tensor in tensors) / weight.numel()


def steps_fused(make_optimizer: Callable[[Any], Optimizer] | None) -> bool:
    """Whether an optimizer would be fused (`optim.fuse`), and so need nothing for itself while it steps.

    Args:
        make_optimizer: makes it from parameters.
    """
    optimizer = _stepped(make_optimizer, nn.Parameter(torch.zeros(1)))
    return optimizer is not None and can_fuse(optimizer)


def _stepped(make_optimizer: Callable[[Any], Optimizer] | None, weight: nn.Parameter) -> Optimizer | None:
    """An optimizer that has made a step; None of one that is built on a GPU, or only within its strategy."""
    weight.grad = torch.zeros_like(weight)
    try:
        assert make_optimizer is not None
        optimizer = make_optimizer([weight])
        optimizer.step()
    except Exception:
        return None
    return optimizer
