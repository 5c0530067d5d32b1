"""Adapters merged into their base weights for a while."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rlhf_lightning.models.peft_library import LoraLayer
from rlhf_lightning.training.zero import is_sharded


@contextmanager
def merged_adapters(model: nn.Module) -> Iterator[None]:
    """Merge a model's LoRA adapters into their base weights for the length of a `with` block.

    One product instead of three in each layer. Afterwards the base weights are the tensors that they were, to the last
    bit: the merged ones are copies, which cost the memory of the adapted weights meanwhile. Another model that shares
    the parameters must not run inside the block. Left as they are: adapters of weights in half precision, whose
    rounding would swallow the change; of weights that other layers use, or that are spread over processes; and
    adapters that are merged already.

    Args:
        model: any model; nothing happens without adapters.
    """
    layers = _mergeable(model)
    bases = [layer.get_base_layer() for layer in layers]
    kept = [(tensor, tensor.data) for base in bases for tensor in (base.weight, base.bias) if tensor is not None]
    try:
        with torch.no_grad():
            for tensor, data in kept:
                tensor.data = data.clone()
            for layer in layers:
                layer.merge()
        yield
    finally:
        for tensor, data in kept:
            tensor.data = data
        for layer in layers:
            layer.merged_adapters.clear()


def _mergeable(model: nn.Module) -> list[Any]:
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    layers = []
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and not layer.merged and not layer.disable_adapters:
            base: Any = layer.get_base_layer()
            if type(base) in (nn.Linear, Conv1D) and _plain(base.weight) and owners[id(base.weight)] == 1:
                layers.append(layer)
    return layers


def _plain(weight: Tensor) -> bool:
    spread = is_sharded(weight) or type(weight) is not nn.Parameter or type(weight.data) is not Tensor
    return weight.dtype in (torch.float32, torch.float64) and not spread
