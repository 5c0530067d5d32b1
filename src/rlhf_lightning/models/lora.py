"""Low-rank adapters beside frozen weights (LoRA): made by PEFT, with first values of our own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_lightning.errors import UserError
from rlhf_lightning.forward.backbone import HEAD
from rlhf_lightning.models.finetune_settings import FineTune
from rlhf_lightning.models.fused_lora import fuse_adapters
from rlhf_lightning.models.lora_targets import layer_targets, parameter_targets, say_what_has_none
from rlhf_lightning.models.peft_library import (
    LoraConfig,
    LoraLayer,
    cast_adapter_dtype,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)
from rlhf_lightning.rng import generator
from rlhf_lightning.training.sharded import gathered, is_sharded, widen_now


def add_adapter(model: PreTrainedModel, finetune: FineTune, name: str = "default") -> None:
    """Put trainable adapters beside the frozen weights; nothing to do for modes other than `lora`.

    The model keeps its class, its backbone and its heads, and computes at first exactly what it did. Adapters of a
    model in half precision are float32. Their first values depend on torch's seed only.

    Args:
        model: changed in place.
        finetune: what to train.
        name: the adapter's name inside the model.

    Raises:
        UserError: a target matches no linear layer, or one that cannot have an adapter.
    """
    if finetune.mode != "lora":
        return
    if finetune.use_dora and is_sharded(model):
        raise UserError("finetune.use_dora does not work on ZeRO-3: leave it out, or use stage 2")
    if finetune.target_parameters and is_sharded(model):
        raise UserError("finetune.target_parameters does not work on ZeRO-3: leave it out, or use stage 2")
    if finetune.use_dora or finetune.target_parameters:
        widen_now(model)  # of which PEFT takes norms
    trained = [p for p in model.parameters() if p.requires_grad]
    if finetune.target_modules == "all-linear":
        say_what_has_none(model, finetune.target_parameters)
    inject_adapter_in_model(lora_config(model, finetune), model, name)
    fuse_adapters(model)
    if not is_sharded(model):  # DeepSpeed keeps its own copy in float32
        cast_adapter_dtype(model, name)
    for parameter in trained:  # peft freezes whatever is not its own
        parameter.requires_grad_(True)
    _draw(model, name)


def lora_config(model: PreTrainedModel, finetune: FineTune) -> LoraConfig:
    """PEFT's description of the adapters.

    Args:
        model: without adapters.
        finetune: what to train.

    Raises:
        UserError: a target matches no linear layer, or one that cannot have an adapter.
    """
    targets, is_conv1d = layer_targets(model, finetune.target_modules)
    head = hasattr(model, HEAD)
    return LoraConfig(
        r=finetune.rank,
        lora_alpha=finetune.alpha,  # type: ignore[arg-type]
        lora_dropout=finetune.dropout,
        target_modules=targets,
        target_parameters=parameter_targets(model, finetune.target_parameters) or None,
        use_dora=finetune.use_dora,
        use_rslora=finetune.use_rslora,
        fan_in_fan_out=is_conv1d,
        task_type="SEQ_CLS" if head else "CAUSAL_LM",
    )


def _draw(model: nn.Module, name: str) -> None:
    """Give adapters their first values: those of a linear layer for A, zero for B.

    As the scalar head, from a stream of their own. Also because ZeRO-3 splits a layer before peft can fill it.
    """
    random = generator("cpu", torch.initial_seed(), "adapter", name)
    for _, layer in lora_layers(model):
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        bound = layer.lora_A[name].in_features ** -0.5
        size = layer.lora_A[name].out_features, layer.lora_A[name].in_features  # experts have `rank` rows each
        drawn = (torch.rand(size, generator=random, device="cpu") * 2 - 1) * bound  # whatever the default device is
        with torch.no_grad(), gathered(a, b):
            a.copy_(drawn)
            b.zero_()


def lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every layer with adapters, and its name."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def adapter_state(model: Any, weights: dict[str, Tensor], name: str = "default") -> dict[str, Tensor]:
    """What `adapter_model.safetensors` of a PEFT folder holds: the adapters, and a classifier's head.

    Args:
        model: with adapters.
        weights: its state dict, for instance from `consolidated_state_dict`.
        name: the adapter's name inside the model.
    """
    # Without False, peft asks the network whether the vocabulary has grown.
    state = get_peft_model_state_dict(model, state_dict=weights, adapter_name=name, save_embedding_layers=False)
    state |= {key: tensor for key, tensor in weights.items() if key.startswith(f"{HEAD}.")}
    return {f"base_model.model.{key}": tensor.contiguous() for key, tensor in state.items()}
