"""Weights that ZeRO-3 splits over the processes: how DeepSpeed marks them, and what all processes must do together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DeepSpeedStrategy as LightningDeepSpeedStrategy
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


def synced(module: pl.LightningModule) -> bool:
    """Whether all processes must run the same number of forward passes (ZeRO-3 gathers weights in each).

    Pass it to `generate(..., synced_gpus=synced(self))`, and never generate on one process only.
    """
    return _is_zero_3(module) and module.trainer.world_size > 1


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
