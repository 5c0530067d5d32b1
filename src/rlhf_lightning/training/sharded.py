"""Weights of which each process holds a part, by ZeRO-3 or FSDP2: how they are told, made whole, and copied.

DeepSpeed marks a parameter that it has split with attributes (`ds_id`, `ds_shape`); FSDP2 puts a `DTensor` in its
place, and a plain tensor for as long as its module computes. All processes must gather the same weights in the same
order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DeepSpeedStrategy as LightningDeepSpeedStrategy
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

COMPUTES_IN = "rlhf_lightning_computes_in"
"""Attribute of a sharded module that is gathered in another type than it is held in."""
_WIDENS = "rlhf_lightning_widens"
"""Attribute of a parameter."""


def is_sharded(weights: nn.Module | Tensor) -> bool:
    """Whether this process holds a part of each weight only, which cannot be read, copied or merged by itself.

    Args:
        weights: a parameter, or a module, of whose parameters one is enough. A module that FSDP2 has sharded stays one
            while its weights are gathered; of a parameter that cannot be told.
    """
    if isinstance(weights, nn.Module):
        return any(isinstance(m, FSDPModule) for m in weights.modules()) or any(map(_is_part, weights.parameters()))
    return _is_part(weights)


def _is_part(weight: Tensor) -> bool:
    return isinstance(weight, DTensor) or hasattr(weight, "ds_id")


def kind_of(module: nn.Module) -> type[nn.Module]:
    """Class of a module as it was before FSDP2 made it one of its own.

    Args:
        module: any module.

    Example:
        >>> kind_of(nn.Linear(2, 2)) is nn.Linear
        True
    """
    classes = type(module).__mro__
    return classes[classes.index(FSDPModule) + 1] if isinstance(module, FSDPModule) else type(module)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks of a transformer, by the list that is as long as it is deep, or by their class.

    Args:
        model: one that is no Hugging Face model has none.
    """
    if not isinstance(model, PreTrainedModel):
        return []
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    for part in model.base_model.modules():
        if isinstance(part, nn.ModuleList) and len(part) == depth:
            return list(part)
    whole = set(model._no_split_modules or [])
    return [part for part in model.base_model.modules() if type(part).__name__ in whole]


def blocks_compute_in(model: nn.Module) -> torch.dtype | None:
    """Type that a model's blocks are gathered in and compute in, where it is not the one that they are held in.

    Args:
        model: any module.
    """
    types = (getattr(part, COMPUTES_IN, None) for part in model.modules() if isinstance(part, FSDPModule))
    return next(filter(None, types), None)


_ahead = ContextVar("_ahead", default=False)


@contextmanager
def to_be_sharded() -> Iterator[None]:
    """Say that models which are loaded in this `with` block will be sharded as soon as all are there."""
    token = _ahead.set(True)
    try:
        yield
    finally:
        _ahead.reset(token)


def will_be_sharded() -> bool:
    """Whether a model is loaded that will be sharded later, as by FSDP2; then whole copies of it are to be avoided.

    What `from_pretrained` loads in the type that it is stored in stays in the file until it is written to.
    """
    return _ahead.get()


def widen_later(weight: Tensor) -> None:
    """Mark a weight in half precision as one that each process makes float32 once it holds a part of it only.

    Args:
        weight: of a model that will be sharded.
    """
    setattr(weight, _WIDENS, True)


def widens_later(weight: Tensor) -> bool:
    """Whether a weight is marked so."""
    return getattr(weight, _WIDENS, False)


def widen_now(weights: nn.Module | Tensor) -> None:
    """Make float32 what is marked so, in place, for whoever computes with it before it is sharded.

    Args:
        weights: a parameter, or a module.
    """
    for weight in weights.parameters() if isinstance(weights, nn.Module) else [weights]:
        if widens_later(weight):
            weight.data = weight.data.float()
    never_widen(weights)


def never_widen(weights: nn.Module | Tensor) -> None:
    """Take the marks away: what was chosen to be in half precision stays so.

    Args:
        weights: a parameter, or a module.
    """
    for weight in weights.parameters() if isinstance(weights, nn.Module) else [weights]:
        if widens_later(weight):
            delattr(weight, _WIDENS)


def dtype_ahead(weight: Tensor) -> torch.dtype:
    """Type that a weight will be held in."""
    return torch.float32 if widens_later(weight) else weight.dtype


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
def gathered(*weights: Tensor, writing: bool = True) -> Iterator[list[Tensor]]:
    """Hold weights whole for the length of a `with` block. Every process must enter it with the same weights.

    Give it one weight at a time and no process ever needs room for the whole model.

    Args:
        *weights: parameters or buffers, sharded or not.
        writing: whether to keep what rank 0 writes inside the block, on all ranks; without it nothing may be written.

    Yields:
        The whole weights, in their order. Those that are not sharded, and those of ZeRO-3, are the given objects;
        those of FSDP2 are others.

    Example:
        >>> weight = nn.Parameter(torch.ones(2))
        >>> with gathered(weight, writing=False) as (whole,):
        ...     whole.sum().item()
        2.0
    """
    of_zero = [weight for weight in weights if hasattr(weight, "ds_id")]
    if of_zero:
        import deepspeed

        with deepspeed.zero.GatheredParameters(of_zero, modifier_rank=0 if writing else None):
            yield list(weights)
        return
    wholes = [_gather(weight) if isinstance(weight, DTensor) else weight for weight in weights]
    yield wholes
    if writing:
        for weight, whole in zip(weights, wholes, strict=True):
            if isinstance(weight, DTensor):
                _scatter(whole, weight)


@torch.no_grad()
def _gather(weight: DTensor) -> Tensor:
    # A part that is kept in CPU memory is sent from the device on which it is used.
    return weight.to(weight.device_mesh.device_type).full_tensor()  # type: ignore[attr-defined]


@torch.no_grad()
def _scatter(whole: Tensor, weight: DTensor) -> None:
    """Give each process its part of what rank 0 holds whole."""
    from torch.distributed.tensor import distribute_tensor

    parts = distribute_tensor(whole.to(weight.device_mesh.device_type), weight.device_mesh, weight.placements)
    weight.to_local().copy_(parts.to_local())


def shards_weights(trainer: pl.Trainer) -> bool:
    """Whether the strategy splits weights over processes, which must then run every forward pass together.

    Args:
        trainer: of any strategy.
    """
    strategy = trainer.strategy
    if isinstance(strategy, LightningDeepSpeedStrategy):
        return bool(strategy.zero_stage_3)
    return isinstance(strategy, ModelParallelStrategy)


def synced(module: pl.LightningModule) -> bool:
    """Whether all processes must run the same number of forward passes, each of which gathers weights.

    Pass it to `generate(..., synced_gpus=synced(self))`, and never generate on one process only.
    """
    return shards_weights(module.trainer) and module.trainer.world_size > 1


def consolidated_state_dict(module: pl.LightningModule, submodule: nn.Module) -> dict[str, Tensor] | None:
    """Copy all weights of a submodule to CPU memory of the first process. Every process must call it.

    Sharded weights are gathered one at a time, so that no GPU needs room for the whole model.

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
            with gathered(tensor, writing=False) as (whole,):
                copies[id(tensor)] = whole.detach().to("cpu", copy=True) if keep else torch.empty(0)
        result[name] = copies[id(tensor)]
    return result if keep else None
