"""Linear layers for the few rows of a decoding step on a CPU.

For every product the matrix library first brings the weights into the order that its kernels read. With few rows that
costs more than the product: on two cores of a Xeon, 8 rows against the weights of a 135M model took 83 ms, and 53 ms
with weights brought into that order once (oneDNN calls it reordering); 32 rows took 166 and 82 ms. MKL's own packing
was faster yet, 35 and 60 ms, but its copies took twice the memory of the weights.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from rlhf_lightning.models.partitioned import is_partitioned

FEWEST, MOST = 4, 64
"""Rows between which it is worth packing: fewer are bound by reading the weights, more make the product the cost."""


@contextmanager
def packed_products(model: nn.Module) -> Iterator[None]:
    """Pack linear layers when few rows first meet them, for the length of a `with` block.

    Meanwhile the weights must not change. The packed weights are copies, and cost the memory of the layers. Nothing
    happens while gradients are recorded, under autocast, or where weights are split over processes (ZeRO-3).

    Args:
        model: its plain linear layers are changed where they lie on a CPU in float32, and changed back.
    """
    layers = [layer for layer in model.modules() if type(layer) is nn.Linear and "forward" not in vars(layer)]
    layers = [layer for layer in layers if layer.weight.device.type == "cpu" and layer.weight.dtype == torch.float32]
    unfit = torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or is_partitioned(model)
    if unfit or not _can_pack():
        layers = []
    for layer in layers:
        layer.forward = _Packed(layer)  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


class _Packed:
    """A layer whose weight `[out, in]` is packed when it first pays."""

    def __init__(self, layer: nn.Linear) -> None:
        self.weight = layer.weight.detach()
        self.bias = layer.bias
        self.packed: Tensor | None = None

    def __call__(self, inputs: Tensor) -> Tensor:
        """`inputs W^T + bias` for inputs `[..., in]`."""
        rows = inputs.numel() // inputs.shape[-1]
        if not FEWEST <= rows <= MOST or inputs.dtype != torch.float32:
            return nn.functional.linear(inputs, self.weight, self.bias)
        if self.packed is None:
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight, rows)
        product: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, self.packed, self.bias, "none", [], "")
        return product


@functools.cache
@torch.no_grad()
def _can_pack() -> bool:
    """Whether this build of torch has oneDNN and its two operators, which are not public."""
    if not torch.backends.mkldnn.is_available():
        return False
    # Not drawn: whether this was asked before must make no difference to a run's random numbers.
    layer = nn.utils.skip_init(nn.Linear, 3, 2, bias=False, dtype=torch.float32)
    inputs = torch.arange(3.0 * FEWEST, dtype=torch.float32).view(FEWEST, 3)
    try:
        layer.weight.copy_(inputs[:2].sin())
        return torch.allclose(_Packed(layer)(inputs), layer(inputs), atol=1e-4)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return False
