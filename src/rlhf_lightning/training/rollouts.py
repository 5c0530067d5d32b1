"""Sharded weights held whole for the length of a rollout.

Generating is a forward pass per token, and layer by layer each of them gathers every weight of the policy anew.
Gathered once, a rollout sends each weight once, whatever the number of tokens, and needs the memory for all of them.
With adapters the frozen weights are gathered as well; what an update sends stays the adapters alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import pytorch_lightning as pl
from torch import nn
from torch.distributed.fsdp import FSDPModule

from rlhf_lightning.training.fsdp2 import FSDP2Strategy
from rlhf_lightning.training.memory import has_room
from rlhf_lightning.training.sharded import COMPUTES_IN, full_shape, is_sharded, synced

RolloutWeights = Literal["auto", "gathered", "layered"]
_HOLDER = -1  # no module of DeepSpeed's has this number


@contextmanager
def rollout_weights(module: pl.LightningModule, model: nn.Module, how: RolloutWeights = "auto") -> Iterator[None]:
    """Hold a sharded model whole for the length of a `with` block, in which it is not trained.

    Every process must enter it. Afterwards each holds its part again, also if the block raised.

    Args:
        module: attached to a trainer; where its strategy shards no weights, nothing happens.
        model: what generates.
        how: `gathered`, `layered` for leaving it as it is, or `auto` for whole where every process has the memory: the
            weights may take half of what is free.

    Example:
        Inside a module's `validation_step`::

            with rollout_weights(self, self.policy):
                texts = generate(self.policy, ...)
    """
    if how == "layered" or not synced(module) or not is_sharded(model):
        yield
        return
    if how == "auto" and not has_room(module, whole_size(model)):
        yield
        return
    hold = _hold_fsdp2 if any(isinstance(part, FSDPModule) for part in model.modules()) else _hold_zero_3
    with hold(module, model):
        yield


def whole_size(model: nn.Module) -> int:
    """Bytes of a sharded model's weights once they are gathered.

    Args:
        model: sharded.
    """
    size = sum(full_shape(p).numel() * p.element_size() for p in model.parameters())
    for part in model.modules():
        if dtype := getattr(part, COMPUTES_IN, None):
            size -= sum(p.numel() * (p.element_size() - dtype.itemsize) for p in part.parameters())
    return size


@contextmanager
def _hold_fsdp2(module: pl.LightningModule, model: nn.Module) -> Iterator[None]:
    parts = [part for part in model.modules() if isinstance(part, FSDPModule)]
    strategy = module.trainer.strategy
    assert isinstance(strategy, FSDP2Strategy)
    trained = any(p.requires_grad for p in model.parameters())
    reshards = strategy.reshard_after_forward or not trained
    finished = False
    try:
        for part in parts:
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()
        yield
        finished = True
    finally:
        for part in parts:
            part.set_reshard_after_forward(reshards, recurse=False)
            part.reshard()
        if not finished:
            strategy.finish_forward(model)


@contextmanager
def _hold_zero_3(module: pl.LightningModule, model: nn.Module) -> Iterator[None]:
    import deepspeed

    weights: list[Any] = [p for p in model.parameters() if hasattr(p, "ds_id")]
    with deepspeed.zero.GatheredParameters(weights, modifier_rank=None):
        try:
            # A layer that has run lets go of its weights, unless another uses them.
            for weight in weights:
                weight.ds_active_sub_modules.add(_HOLDER)
            yield
        finally:
            for weight in weights:
                weight.ds_active_sub_modules.clear()
