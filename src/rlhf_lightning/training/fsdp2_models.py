"""What FSDP2 shards of the models of a module: each block, the backbone, the output layer, and what else is trained.

A group of weights is gathered when its module is called, so a module must be one that is called. The Hugging Face model
as a whole is not: backbone and output layer are called apart, past any hook of the model around them. Input embeddings
that are also the output layer belong to two modules; they are one group that either call gathers.

Several models of a module may hold the very same frozen weights (`models/sharing.py`); their parts are shared as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from rlhf_lightning.errors import UserError
from rlhf_lightning.training.sharded import COMPUTES_IN, blocks_of, widen_later, widens_later

Place = tuple[nn.Module, str]
"""A module and the name of one of its own parameters."""


@dataclass(frozen=True)
class Sharding:
    """How models are sharded.

    Args:
        mesh: the processes, in one dimension.
        device: on which this process computes.
        blocks: types in which the blocks are gathered and reduced; where they are gathered in another type than they
            are held in, they compute in that.
        others: the same of all else: embeddings, last norm and output layers.
        offload: where parts are kept.
        reshard_after_forward: of models that are trained; the whole weights of others always go after their forward
            pass, as no backward pass would let go of them.
    """

    mesh: DeviceMesh
    device: torch.device
    blocks: MixedPrecisionPolicy
    others: MixedPrecisionPolicy
    offload: OffloadPolicy
    reshard_after_forward: bool

    def apply(self, module: nn.Module | list[nn.Module], trained: bool, policy: MixedPrecisionPolicy) -> None:
        """Make the weights of a module, or of several, that are in no group yet one group."""
        modules = module if isinstance(module, list) else [module]
        narrow = [place for each in modules for place in _places(each) if widens_later(getattr(*place))]
        fully_shard(
            module,
            mesh=self.mesh,
            mp_policy=policy,
            offload_policy=self.offload,
            reshard_after_forward=self.reshard_after_forward or not trained,
            # In four bits a weight has no rows to share out.
            ignored_params={p for each in modules for p in each.parameters() if not p.is_floating_point()},
        )
        parts = {id(getattr(*place)) for place in narrow}
        for each in modules if parts else ():
            each._apply(lambda tensor: tensor.float() if id(tensor) in parts else tensor)


def _places(module: nn.Module) -> Iterator[Place]:
    return ((owner, name) for owner in module.modules() for name, _ in owner.named_parameters(recurse=False))


def _compute_in(block: Any, dtype: torch.dtype, device_type: str) -> None:
    """Let a block compute in the type that its weights are gathered in, also where nobody asked for autocast."""
    block.forward = torch.autocast(device_type, dtype, cache_enabled=False)(block.forward)
    setattr(block, COMPUTES_IN, dtype)


def _compute_on(model: Any, device: torch.device) -> None:
    """Let a model name the device that it computes on, where its parts are kept elsewhere.

    transformers looks at the first weight. The class goes by the same name, which is looked up and saved.
    """
    kind = type(model)
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    model.__class__ = type(kind.__name__, (kind,), {**names, "device": property(lambda _: device)})


def shard_models(module: pl.LightningModule, sharding: Sharding) -> None:
    """Shard every transformers model of a module, and what is trained outside of them. Every process must call it.

    Args:
        module: changed in place; what is sharded already stays so.
        sharding: how.

    Raises:
        UserError: a weight that is trained belongs to no module that is called.
    """
    models = [model for model in _outermost_models(module) if not isinstance(model.base_model, FSDPModule)]
    shared = _part_company(models)
    outside = [*_outside(module, models)]
    for model in models:
        _shard_model(model, sharding, [part for part in outside if _owners_of(model.base_model, part)])
    for first, others in shared:
        weight = first[0]._parameters[first[1]]
        for owner, name in others:
            owner._parameters[name] = weight  # FSDP2 takes over what stands here at its first forward pass
    for part in [part for part in module.modules() if any(map(_is_left, part.parameters(recurse=False)))]:
        if part is module or isinstance(part, PreTrainedModel):
            raise UserError(f"FSDP2Strategy: weights of {type(part).__name__} itself cannot be trained on it; use ddp")
        sharding.apply(part, True, sharding.others)


def _is_left(weight: Tensor) -> bool:
    return weight.requires_grad and not isinstance(weight, DTensor)


def _outermost_models(module: nn.Module) -> list[PreTrainedModel]:
    inner = {id(part) for model in module.modules() if isinstance(model, PreTrainedModel) for part in _below(model)}
    return [part for part in module.modules() if isinstance(part, PreTrainedModel) and id(part) not in inner]


def _outside(module: nn.Module, models: list[PreTrainedModel]) -> Iterator[nn.Module]:
    """The modules with weights that stand in no model."""
    inside = {id(part) for model in models for part in model.modules()}
    for part in module.modules():
        if id(part) not in inside and any(True for _ in part.parameters(recurse=False)):
            yield part


def _below(model: nn.Module) -> Iterator[nn.Module]:
    return (part for part in model.modules() if part is not model)


def _part_company(models: list[PreTrainedModel]) -> list[tuple[Place, list[Place]]]:
    """Give each model parameters of its own, on the same memory; returns where the same parameter stood.

    FSDP2 would move what it shards to the device for all of them, and shard it for one.
    """
    places: dict[int, dict[int, list[Place]]] = {}
    for number, model in enumerate(models):
        for owner in model.modules():
            for name, weight in owner.named_parameters(recurse=False):
                if weight.is_floating_point():
                    places.setdefault(id(weight), {}).setdefault(number, []).append((owner, name))
    shared = []
    for by_model in places.values():
        (first, *_), *others = by_model.values()
        if others and getattr(*first).requires_grad:
            raise UserError(f"FSDP2Strategy: the weight '{first[1]}' is trained in two models at once; use ddp")
        for of_model in others:
            twin = nn.Parameter(getattr(*of_model[0]).detach(), requires_grad=False)
            if widens_later(getattr(*of_model[0])):
                widen_later(twin)
            for owner, name in of_model:
                owner._parameters[name] = twin
        if others:
            shared.append((first, [place for of_model in others for place in of_model]))
    return shared


def _shard_model(model: PreTrainedModel, sharding: Sharding, tied: list[nn.Module]) -> None:
    """Shard a model, and modules outside of it that hold weights of its backbone, too."""
    base: nn.Module = model.base_model
    trained = any(p.requires_grad for p in model.parameters())
    for block in blocks_of(model):
        sharding.apply(block, trained, sharding.blocks)
        if sharding.blocks.param_dtype is not None:
            _compute_in(block, sharding.blocks.param_dtype, sharding.mesh.device_type)
    heads = [*([] if base is model else _beside(model, base)), *tied]
    for head in heads:
        if owners := _owners_of(base, head):
            _shard_together(owners, head, trained, sharding)
    sharding.apply(base, trained, sharding.others)
    for head in heads:
        if any(not isinstance(p, DTensor) for p in head.parameters()):
            sharding.apply(head, trained, sharding.others)
    if isinstance(sharding.offload, CPUOffloadPolicy):
        _compute_on(model, sharding.device)


def _beside(model: nn.Module, base: nn.Module) -> Iterator[nn.Module]:
    """The modules with weights that stand beside the backbone."""
    for child in model.children():
        if child is base:
            continue
        if any(part is base for part in child.modules()):
            yield from _beside(child, base)
        elif any(True for _ in child.parameters()):
            yield child


def _owners_of(base: nn.Module, head: nn.Module) -> list[nn.Module]:
    """The modules of the backbone that hold weights of a head, too."""
    weights = {id(p) for p in head.parameters()}
    return [part for part in base.modules() if any(id(p) in weights for p in part.parameters(recurse=False))]


def _shard_together(owners: list[nn.Module], head: nn.Module, trained: bool, sharding: Sharding) -> None:
    """Make modules that hold the same weight one group, gathered for each call of any of them.

    torch would wait until all of them have run before it lets go of the weight, but a backbone runs without its head.
    """
    if any(isinstance(owner, FSDPModule) for owner in owners):
        raise UserError(f"FSDP2Strategy: {type(head).__name__} shares weights with a whole block; use ddp")
    modules = [*owners, head]
    sharding.apply(modules, trained, sharding.others)
    state: Any = fully_shard.state(head)  # type: ignore[attr-defined]
    state._pre_forward_hook_handle.remove()
    state._post_forward_hook_handle.remove()
    for module in modules:
        module.register_forward_pre_hook(state._pre_forward, prepend=True, with_kwargs=True)
        module.register_forward_hook(state._post_forward)


def roots(model: nn.Module) -> list[Any]:
    """The sharded parts of a model that have run and are inside no other, as FSDP2 counts them.

    Args:
        model: any module.
    """
    parts: list[Any] = [part for part in model.modules() if isinstance(part, FSDPModule)]
    return [part for part in parts if part._get_fsdp_state()._is_root]
