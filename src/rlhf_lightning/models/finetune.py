"""Which weights are trained: all of them, the last layer, or low-rank adapters beside frozen ones (LoRA).

The order of calls is: load the model, `choose_trained`, then perhaps make a frozen twin that shares what is frozen,
then `add_adapter`. What is saved comes from `merging.merged_state` (a plain model) or `adapter_state` (a PEFT
adapter).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_lightning.arguments import AT_LEAST_1, POSITIVE, SHARE_BELOW_1, check_arguments
from rlhf_lightning.errors import UserError
from rlhf_lightning.forward.backbone import HEAD
from rlhf_lightning.forward.output_layer import is_tied
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
from rlhf_lightning.training.zero import full_shape, gathered, is_sharded

_FINAL_NORM = re.compile(r"(final_)?(layer_?)?norm|(ln|norm)_f")


@dataclass(frozen=True)
class FineTune:
    """Which weights are trained.

    Args:
        mode: `all` trains every weight; `last_layer` the last transformer block, the final norm and the output layer;
            `lora` low-rank adapters beside frozen weights (Hu et al. 2021), and a reward model's head.
        rank: inner dimension of the adapters.
        alpha: the adapters' product is multiplied by alpha / rank.
        dropout: dropout in front of the adapters.
        target_modules: which layers get an adapter: `all-linear` for every linear layer but the output layer, a list of
            names such as [q_proj, v_proj], or a regular expression that matches whole names.
        target_parameters: which weights that are no layers get an adapter as well: the ends of their names, such as
            [experts.gate_up_proj, experts.down_proj] for the experts of a mixture, which are one weight together.
        use_dora: learn the magnitude of each row of a weight beside its direction (DoRA, Liu et al. 2024).
        use_rslora: multiply by alpha / sqrt(rank) instead (rsLoRA, Kalajdzievski 2023).
        export: `merged` exports a plain model, the adapters added to the weights; `adapter` only what was trained, as a
            PEFT folder that needs its base.

    Raises:
        UserError: a number is out of its range, or there would be no adapter to export.
    """

    mode: Literal["all", "last_layer", "lora"] = "all"
    rank: int = 16
    alpha: float = 32
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    target_parameters: list[str] = field(default_factory=list)
    use_dora: bool = False
    use_rslora: bool = False
    export: Literal["merged", "adapter"] = "merged"

    def __post_init__(self) -> None:
        ranges = {"rank": AT_LEAST_1, "alpha": POSITIVE, "dropout": SHARE_BELOW_1}
        check_arguments(FineTune, vars(self), ranges, "finetune.")
        if self.export == "adapter" and self.mode != "lora":
            raise UserError(f"finetune.export adapter needs finetune.mode lora, not {self.mode}: it makes no adapter")
        if not self.target_modules and not self.target_parameters:
            raise UserError("finetune.target_modules is empty; use all-linear or a list of layer names")
        if self.target_parameters and (self.use_dora or self.dropout):
            raise UserError("finetune.target_parameters can have neither use_dora nor dropout: set dropout to 0")
        if isinstance(self.target_modules, str):
            try:
                re.compile(self.target_modules)
            except re.error as e:
                raise UserError(
                    f"finetune.target_modules '{self.target_modules}' is not a regular expression: {e}"
                ) from e


def choose_trained(model: PreTrainedModel, finetune: FineTune) -> None:
    """Set `requires_grad` of every weight; the adapters of `lora` come with `add_adapter`.

    An output layer that is tied to the input embeddings stays frozen with `last_layer`: training it would train the
    model's first layer, too, and most of a small model's weights.

    Args:
        model: a language model or a sequence classifier, without adapters; changed in place.
        finetune: what to train.

    Raises:
        UserError: the blocks of this family are not found.
    """
    model.requires_grad_(finetune.mode == "all")
    if finetune.mode == "all":
        return
    head = getattr(model, HEAD, None)
    trained: list[nn.Module] = [] if head is None else [head]
    if finetune.mode == "last_layer":
        trained += _last_layer(model)
        output = model.get_output_embeddings()
        if isinstance(output, nn.Module) and not is_tied(model, output):
            trained.append(output)
    for module in trained:
        module.requires_grad_(True)


def _last_layer(model: PreTrainedModel) -> list[nn.Module]:
    """The last block, and the norms that stand after all blocks."""
    depth = model.config.get_text_config().num_hidden_layers
    for parent in model.base_model.modules():
        for blocks in parent.children():
            if isinstance(blocks, nn.ModuleList) and len(blocks) == depth:
                norms = [child for name, child in parent.named_children() if _FINAL_NORM.fullmatch(name)]
                return [blocks[-1], *norms]
    raise UserError(
        f"finetune.mode last_layer: {type(model).__name__} has no list of {depth} blocks; use all or lora instead"
    )


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


def enable_gradient_checkpointing(model: PreTrainedModel) -> None:
    """Keep only the input of each block for the backward pass, and compute the rest again.

    Args:
        model: changed in place.

    Raises:
        UserError: this family cannot do it.
    """
    if not model.supports_gradient_checkpointing:
        raise UserError(f"gradient_checkpointing: {type(model).__name__} does not support it; set it to false")
    # transformers renamed it within version 5. The reentrant kind gives no gradient where a block's input has none, as
    # with frozen embeddings.
    untyped: Any = model
    enable = getattr(untyped, "activation_checkpointing_enable", None) or untyped.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def prepare_for_training(model: PreTrainedModel, finetune: FineTune, gradient_checkpointing: bool = False) -> None:
    """`choose_trained` and `add_adapter`, for stages that need nothing in between.

    Args:
        model: changed in place.
        finetune: what to train.
        gradient_checkpointing: also save memory as `enable_gradient_checkpointing` does.
    """
    choose_trained(model, finetune)
    add_adapter(model, finetune)
    if gradient_checkpointing:
        enable_gradient_checkpointing(model)


def describe_trained(model: nn.Module, finetune: FineTune) -> str:
    """One line that says how much of a model is trained.

    Args:
        model: after `choose_trained` and `add_adapter`.
        finetune: how that was chosen.

    Example:
        >>> describe_trained(nn.Linear(1000, 3), FineTune())
        'training 3.0 k of 3.0 k parameters (all)'
    """
    # ZeRO-3 holds a shard of each weight; its full shape is recorded beside it.
    sizes = [(full_shape(p).numel(), p.requires_grad) for p in model.parameters()]
    trained, total = sum(size for size, is_trained in sizes if is_trained), sum(size for size, _ in sizes)
    rank = f", rank {finetune.rank}" if finetune.mode == "lora" else ""
    return f"training {_short(trained)} of {_short(total)} parameters ({finetune.mode}{rank})"


def _short(count: int) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return str(count)


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
