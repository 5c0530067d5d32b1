"""Which weights are trained: all of them, the last layer, or low-rank adapters beside frozen ones (LoRA).

The order of calls is: load the model, `choose_trained`, then perhaps make a frozen twin that shares what is frozen,
then `lora.add_adapter`. What is saved comes from `merging.merged_state` (a plain model) or `lora.adapter_state` (a PEFT
adapter).
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from rlhf_lightning.errors import UserError
from rlhf_lightning.forward.backbone import HEAD
from rlhf_lightning.forward.output_layer import is_tied
from rlhf_lightning.models.finetune_settings import FineTune
from rlhf_lightning.models.lora import add_adapter
from rlhf_lightning.training.sharded import full_shape

_FINAL_NORM = re.compile(r"(final_)?(layer_?)?norm|(ln|norm)_f")


def choose_trained(model: PreTrainedModel, finetune: FineTune) -> None:
    """Set `requires_grad` of every weight; the adapters of `lora` come with `lora.add_adapter`.

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
        model: after `choose_trained` and `lora.add_adapter`.
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
