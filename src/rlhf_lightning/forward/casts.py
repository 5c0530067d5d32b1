"""Weights that are cast once for many forward passes under autocast.

Lightning's autocast keeps no casts: each forward pass, and so each micro-batch and each decoded token, reads all the
weights in float32 and writes them again in half precision. Here the layers of a model see casts that were made once,
for as long as the weights do not change. What is computed is the same to the last bit: autocast would have cast the
same numbers in the same way. Only DoRA also reads weights outside of products, whose norms then come of the casts.

Embeddings, norms and heads of scalars stay as they are, for autocast leaves them alone, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_lightning.training.sharded import is_sharded

PRODUCT_WEIGHT = "rlhf_lightning_product_weight"
"""Attribute of a trained output layer: the cast of its weight, whose gradient is summed in float32 all the same."""

_LINKED = "rlhf_lightning_linked_weight"
"""Attribute of a trained layer: the cast of its weight."""

_SHADOWING = ("weight", "bias", PRODUCT_WEIGHT, _LINKED)


class CastWeights:
    """Casts of the weights of models' linear layers in autocast's type, made where autocast is on.

    They shadow the layers' own weights, which stay where they are for optimizers, state dicts and strategies. With
    gradients on, those of the casts go on to the weights, for each use, as they do without.

    Args:
        *models: modules that hold models of transformers; of others, and of sharded ones, nothing is cast.
    """

    def __init__(self, *models: nn.Module) -> None:
        inner = [part for model in models for part in model.modules() if isinstance(part, PreTrainedModel)]
        # Of a model, its backbone and its output layer: a head of scalars computes in float32.
        owners = [part for model in inner for part in (model.base_model, model.get_output_embeddings())]
        layers = {layer: None for owner in owners if owner is not None for layer in owner.modules()}
        self._heads = {model.get_output_embeddings() for model in inner}
        self._layers = [] if any(map(is_sharded, models)) else [layer for layer in layers if type(layer) is nn.Linear]
        self._copies: dict[Tensor, Tensor] = {}  # by the weight, which several models may hold

    @contextmanager
    def used(self) -> Iterator[None]:
        """Cast the weights as they are now, and let the layers see the casts for the length of a `with` block."""
        made: set[Tensor] = set()
        shadows = [shadow for layer in self._layers for shadow in self._shadows(layer, made)]
        try:
            for layer, name, cast in shadows:
                vars(layer)[name] = cast
                if name == _LINKED:
                    layer.__class__ = _LinkedLinear
            yield
        finally:
            for layer, name, _ in shadows:
                vars(layer).pop(name, None)
                if name == _LINKED:
                    layer.__class__ = nn.Linear

    def _shadows(self, layer: nn.Linear, made: set[Tensor]) -> Iterator[tuple[nn.Linear, str, Tensor]]:
        """What a layer sees instead of its own, by the name of the attribute; `made` are weights that were cast."""
        weight, bias = layer._parameters["weight"], layer._parameters["bias"]
        assert weight is not None
        kind = weight.device.type
        if weight.dtype != torch.float32 or not torch.is_autocast_enabled(kind):
            return
        dtype = torch.get_autocast_dtype(kind)
        if not (torch.is_grad_enabled() and weight.requires_grad):
            yield layer, "weight", self._kept(weight, dtype, made)
            if bias is not None and not (torch.is_grad_enabled() and bias.requires_grad):
                yield layer, "bias", self._kept(bias, dtype, made)
            return
        yield layer, PRODUCT_WEIGHT if layer in self._heads else _LINKED, weight.detach().to(dtype)

    def _kept(self, weight: Tensor, dtype: torch.dtype, made: set[Tensor]) -> Tensor:
        kept = self._copies.get(weight)
        if kept is None or kept.device != weight.device:
            kept = self._copies[weight] = weight.detach().to(dtype)
        elif weight not in made:  # a graph that is replayed reads the cast where it was at first
            kept.copy_(weight.detach())
        made.add(weight)
        return kept


class _LinkedLinear(nn.Linear):
    """A layer whose weight is its cast.

    Each use is linked to the weight anew: a cast that all micro-batches shared would be the first node of every graph,
    which a backward pass comes to last, with the gradients of all layers in memory until then.
    """

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        linked: Tensor = _Linked.apply(self._parameters["weight"], vars(self)[_LINKED])
        return linked


class _Linked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, cast: Tensor) -> Tensor:
        ctx.dtype = weight.dtype
        return cast.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.to(ctx.dtype), None


@contextmanager
def cast_once(*models: nn.Module) -> Iterator[None]:
    """Let models see casts of their weights, as they are now, for the length of a `with` block.

    Args:
        *models: as for `CastWeights`.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=8, num_hidden_layers=1, **sizes))
        >>> with torch.autocast("cpu", torch.bfloat16), cast_once(model):
        ...     print(model.model.layers[0].mlp.up_proj.weight.dtype)
        torch.bfloat16
    """
    with CastWeights(*models).used():
        yield


@contextmanager
def own_weights(model: nn.Module) -> Iterator[None]:
    """Let a model see its own weights for the length of a `with` block, whoever has cast them meanwhile.

    Args:
        model: any.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    kinds = [layer.__class__ for layer in layers]
    lifted = [(layer, name, vars(layer).pop(name)) for layer in layers for name in _SHADOWING if name in vars(layer)]
    try:
        for layer, _, _ in lifted:
            layer.__class__ = nn.Linear if type(layer) is _LinkedLinear else type(layer)
        yield
    finally:
        for layer, kind in zip(layers, kinds, strict=True):
            layer.__class__ = kind
        for layer, name, cast in lifted:
            vars(layer)[name] = cast
