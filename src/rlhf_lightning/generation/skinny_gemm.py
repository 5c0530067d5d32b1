"""Linear layers for the few rows of a decoding step on a CPU.

The matrix library takes `x W^T` for few rows of x at less than half the speed that it takes `W x^T` at: on two cores of
a Xeon, 16 rows against weights of 1536 by 576 ran at 32 and at 76 GFLOP/s. The weights stay as they are; only the rows
are transposed, which is a copy of a few kilobytes.

Notation: n rows, `in` and `out` are the layer's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

FEWEST, MOST = 4, 32
"""Rows between which it is the faster way; benchmarks/RESULTS.md has the figures."""


@contextmanager
def skinny_gemm(model: nn.Module) -> Iterator[None]:
    """Compute linear layers that way for the length of a `with` block.

    Args:
        model: its plain linear layers are changed where they lie on a CPU in float32, and changed back.
    """
    layers = [layer for layer in model.modules() if type(layer) is nn.Linear and "forward" not in vars(layer)]
    layers = [layer for layer in layers if layer.weight.device.type == "cpu" and layer.weight.dtype == torch.float32]
    for layer in layers:
        layer.__class__ = _SkinnyLinear
    try:
        yield
    finally:
        for layer in layers:
            layer.__class__ = nn.Linear


class _SkinnyLinear(nn.Linear):
    """A class and not an attribute of each layer: what is compiled against it stays valid in the next `with` block."""

    def forward(self, inputs: Tensor) -> Tensor:
        rows = inputs.numel() // inputs.shape[-1]
        if not FEWEST <= rows <= MOST or inputs.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
            return super().forward(inputs)
        columns = inputs.reshape(rows, -1).t().contiguous()  # [in, n]
        weight, bias = self.weight, self.bias
        # [out, in] x [in, n]
        product = weight @ columns if bias is None else torch.addmm(bias[:, None], weight, columns)
        outputs: Tensor = product.t().contiguous().unflatten(0, inputs.shape[:-1])
        return outputs
