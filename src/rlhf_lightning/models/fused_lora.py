"""LoRA layers that add their change to the output of the base layer in place.

PEFT's layers write the change, its scaled copy and the sum, each as large as the output; reading and writing those
costs more than the change itself, which is two thin products. Here the second product adds to the output, and the
backward pass does the same with the gradient of the input. Same sums, in another order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rlhf_lightning.models.peft_library import LoraLinear
from rlhf_lightning.training.sharded import is_sharded


def fuse_adapters(model: nn.Module) -> None:
    """Make a model's LoRA layers such ones where they stand beside plain linear layers; no state changes.

    Args:
        model: changed in place. Weights that are sharded over processes (ZeRO-3) are gathered by PEFT's layers only.
    """
    if is_sharded(model):
        return
    for layer in model.modules():
        if type(layer) is LoraLinear and type(layer.get_base_layer()) is nn.Linear:
            layer.__class__ = FusedLoraLinear


class FusedLoraLinear(LoraLinear):
    """PEFT's layer, with a quicker way for the usual case: one plain adapter beside a frozen weight of its own type."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As PEFT's; `[..., in]` to `[..., out]`."""
        adapter = None if args or kwargs else self._usual_adapter(x)
        if adapter is None:
            return super().forward(x, *args, **kwargs)
        base: Any = self.get_base_layer()
        a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        output: Tensor = _FusedLora.apply(x, base.weight, base.bias, a, b, self.scaling[adapter])
        return output

    def _usual_adapter(self, x: Tensor) -> str | None:
        if self.disable_adapters or self.merged or len(self.active_adapters) != 1:
            return None
        (name,) = self.active_adapters
        if name not in self.lora_A or name in self.lora_variant or self.fan_in_fan_out:
            return None
        dropout = self.lora_dropout[name]
        if self.training and not isinstance(dropout, nn.Identity):
            return None
        base: Any = self.get_base_layer()
        types = {x.dtype, base.weight.dtype, self.lora_A[name].weight.dtype, self.lora_B[name].weight.dtype}
        trained = base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad)
        # What ZeRO-3 shards later is gathered for modules that are called; here none is.
        sharded = is_sharded(base.weight)
        plain = len(types) == 1 and not trained and not sharded and not self.lora_bias[name]
        return name if plain and not torch.is_autocast_enabled(x.device.type) else None


class _FusedLora(torch.autograd.Function):
    """`x W^T + bias + scaling (x A^T) B^T` for x `[..., in]`, W `[out, in]`, A `[r, in]`, B `[out, r]`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        inner = rows @ a.t()
        output = nn.functional.linear(rows, weight, bias).addmm_(inner, b.t(), alpha=scaling)
        ctx.save_for_backward(rows, inner, weight, a, b)
        ctx.scaling = scaling
        return output.view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, inner, weight, a, b = ctx.saved_tensors
        of_rows = gradient.reshape(-1, len(weight))
        of_inner = (of_rows @ b).mul_(ctx.scaling)
        of_x = of_a = of_b = None
        if ctx.needs_input_grad[0]:
            of_x = (of_rows @ weight).addmm_(of_inner, a).view(*gradient.shape[:-1], weight.shape[1])
        if ctx.needs_input_grad[3]:
            of_a = of_inner.t() @ rows
        if ctx.needs_input_grad[4]:
            of_b = (of_rows.t() @ inner).mul_(ctx.scaling)
        return of_x, None, None, of_a, of_b, None
