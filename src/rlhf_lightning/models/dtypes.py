"""Tensors that must stay float32 whatever the weights become.

`Trainer(precision="bf16-true")`, DeepSpeed and `model.to(torch.bfloat16)` cast everything they find: also the
frequencies of rotary position embeddings, which transformers holds in float32 in every precision (rounded, they turn
far tokens by a wrong angle), and the sums of metrics (a count in bfloat16 stops at 256).
"""

from __future__ import annotations

from typing import TypeVar

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
        >>> import torch
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


def _keeping_dtype(convert: Convert) -> Convert:
    def move(tensor: Tensor) -> Tensor:
        moved = convert(tensor)
        return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

    return move
