"""Tensors that must stay float32 whatever the weights become.

`Trainer(precision="bf16-true")`, DeepSpeed and `model.to(torch.bfloat16)` cast everything they find: also the
frequencies of rotary position embeddings, which transformers holds in float32 in every precision (rounded, they turn
far tokens by a wrong angle), and the sums of metrics (a count in bfloat16 stops at 256).
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from rlhf_lightning.compat import Convert, wrap_conversion

Kept = TypeVar("Kept", bound=nn.Module)


def keep_dtype(module: Kept) -> Kept:
    """Let a module move between devices but never change its dtype again.

    Args:
        module: changed in place, with all it contains.

    Returns:
        The same module.

    Example:
        >>> keep_dtype(nn.Linear(1, 1)).to(torch.bfloat16).weight.dtype
        torch.float32
    """
    wrap_conversion(module, _keeping_dtype)
    return module


def keep_tables(model: nn.Module) -> None:
    """Keep the dtype of what a model computes from its config alone: buffers of modules without weights.

    Args:
        model: as `from_pretrained` returns it, in any dtype; changed in place.
    """
    for module in model.modules():
        weightless = next(module.parameters(), None) is None and not module.state_dict()
        if weightless and any(buffer.is_floating_point() for buffer in module.buffers(recurse=False)):
            keep_dtype(module)


def linear_in_float32(layer: Any, inputs: Tensor) -> Tensor:
    """Call a small linear layer in float32, for outputs that are differences of large numbers.

    A score of 5 in bfloat16 is one of 4.97, 5 and 5.03, so that a pair's two scores often tie.

    Args:
        layer: an `nn.Linear` of any precision.
        inputs: `[..., D]`, of any precision; under autocast too.

    Returns:
        `[..., N]`, float32.
    """

    def forward(rows: Tensor) -> Tensor:
        bias = None if layer.bias is None else layer.bias.float()
        return nn.functional.linear(rows.float(), layer.weight.float(), bias)

    # As the layer's own forward: under ZeRO-3 its weight is there only while it is called.
    layer.forward = forward
    try:
        with torch.autocast(inputs.device.type, enabled=False):
            outputs: Tensor = layer(inputs)
            return outputs
    finally:
        del layer.forward


def _keeping_dtype(convert: Convert) -> Convert:
    def move(tensor: Tensor) -> Tensor:
        moved = convert(tensor)
        return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

    return move
