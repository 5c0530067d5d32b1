"""Linear layers that read bfloat16 copies of their weights, for answers that are written one at a time on a CPU.

A token of one answer reads every weight once, so that its time is that of reading memory, and half as many bytes take
half as long. Inputs, sums within a product, and everything between the layers stay as they are: what is rounded are the
weights (not at all where they were stored in bfloat16) and each layer's input and output, to 8 bits of mantissa.

Notation: n rows, `in` and `out` are the layer's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

MOST = 4
"""Rows up to which reading the copies once for each is no slower than reading the weights once for all."""


class HalfWeights:
    """Copies of a model's weights in bfloat16.

    Args:
        model: its plain linear layers on a CPU in float32 are copied, but for those below adapters, whose weights are
            others while the adapters are merged. Weights that change later are not copied again.
    """

    def __init__(self, model: nn.Module) -> None:
        self._copies = {layer: layer.weight.detach().bfloat16() for layer in _layers(model)}  # [out, in] each

    @contextmanager
    def used(self) -> Iterator[None]:
        """Multiply few rows by the copies for the length of a `with` block; more rows are multiplied as before."""
        for layer, copy in self._copies.items():
            layer.__class__, layer.half_weight = _HalfLinear, copy
        try:
            yield
        finally:
            for layer in self._copies:
                layer.__class__ = nn.Linear
                del layer.half_weight


def _layers(model: nn.Module) -> Iterator[nn.Linear]:
    for name, layer in model.named_modules():
        plain = type(layer) is nn.Linear and "forward" not in vars(layer) and not name.endswith("base_layer")
        if plain and layer.weight.device.type == "cpu" and layer.weight.dtype == torch.float32:
            yield layer


class _HalfLinear(nn.Linear):
    half_weight: Tensor

    def forward(self, inputs: Tensor) -> Tensor:
        rows = inputs.numel() // inputs.shape[-1]
        if not 1 <= rows <= MOST or inputs.dtype != torch.float32:
            return super().forward(inputs)
        if rows == 1:  # a step of one answer, in which each further operation is felt
            outputs = torch.mv(self.half_weight, inputs.reshape(-1).bfloat16()).float()  # [out]
        else:
            halves = inputs.reshape(rows, -1).bfloat16()  # [n, in]
            outputs = torch.stack([torch.mv(self.half_weight, row) for row in halves]).float()  # [n, out]
        outputs = outputs if self.bias is None else outputs + self.bias
        return outputs.view(*inputs.shape[:-1], -1)
