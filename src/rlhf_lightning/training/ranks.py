"""What all processes know together, and what a strategy does with a module."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, TypeVar

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DeepSpeedStrategy as LightningDeepSpeedStrategy
from torch import Tensor, nn

PieceT = TypeVar("PieceT")


def world_size(module: pl.LightningModule) -> int:
    """Number of processes that train this module together."""
    return module.trainer.world_size


def sum_over_ranks(module: pl.LightningModule, tensor: Tensor) -> Tensor:
    """Sum a tensor over all processes; every process must call it with the same shape.

    Args:
        module: a module attached to a running trainer.
        tensor: any shape; on one process it is returned as it is.

    Returns:
        The sum, same shape and type, no gradient, the same on every process.
    """
    if module.trainer.world_size == 1:
        return tensor
    return module.all_gather(tensor).sum(dim=0, dtype=tensor.dtype)  # type: ignore[union-attr]


def synced(module: pl.LightningModule) -> bool:
    """Whether all processes must run the same number of forward passes (ZeRO-3 gathers weights in each).

    Pass it to `generate(..., synced_gpus=synced(self))`, and never generate on one process only.
    """
    return _is_zero_3(module) and world_size(module) > 1


def consolidated_state_dict(module: pl.LightningModule, submodule: nn.Module) -> dict[str, Tensor] | None:
    """Copy all weights of a submodule to CPU memory of the first process. Every process must call it.

    Under ZeRO-3 one weight at a time is gathered, so that no GPU needs room for the whole model.

    Args:
        module: the module attached to the trainer; it tells which strategy runs.
        submodule: the part to copy, often `module.policy.model`.

    Returns:
        On the first process a copy of the whole state dict, tied weights still sharing memory; None on the others.
    """
    keep = module.trainer.is_global_zero
    copies: dict[int, Tensor] = {}
    result: dict[str, Tensor] = {}
    for name, tensor in submodule.state_dict(keep_vars=True).items():
        if id(tensor) not in copies:
            with _gathered(module, tensor):
                copies[id(tensor)] = tensor.detach().to("cpu", copy=True) if keep else torch.empty(0)
        result[name] = copies[id(tensor)]
    return result if keep else None


def _gathered(module: pl.LightningModule, weight: Tensor) -> Any:
    if not _is_zero_3(module):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([weight])


def _is_zero_3(module: pl.LightningModule) -> bool:
    strategy = module.trainer.strategy
    return isinstance(strategy, LightningDeepSpeedStrategy) and strategy.zero_stage_3


def equally_many(module: pl.LightningModule, cut: Callable[[int], list[PieceT]]) -> list[PieceT]:
    """Cut a batch into as many pieces on this process as on every other; each must go through the model as often.

    Args:
        module: attached to a trainer; every process must call this.
        cut: gives the pieces of this process, at least as many as it is asked for.

    Example:
        In a `training_step`::

            pieces = equally_many(self, lambda n: micro_batches(batch, max_tokens=4096, min_pieces=n))
    """
    pieces = cut(1)
    if module.trainer.world_size == 1:
        return pieces
    most = module.all_gather(torch.tensor(len(pieces), device=module.device)).max()  # type: ignore[union-attr]
    return pieces if len(pieces) == int(most) else cut(int(most))
