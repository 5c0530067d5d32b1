"""Adapters added to the weights that they stand beside: for a while, and in what is exported.

Both add them by the same formula, in float32 at least, and leave the model's own weights as they are to the last bit.
(An adapter folder that a run starts from may hold more than LoRA, of anybody's making: PEFT itself merges it, in
`adapters.merge_adapter`.)

Notation: E experts, r rank of the adapter; `in` and `out` are the layer's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rlhf_lightning.models.lora import lora_layers
from rlhf_lightning.models.peft_library import ParamWrapper
from rlhf_lightning.training.sharded import is_sharded

_BASE = "base_layer"
"""What PEFT calls a layer inside the one that it puts in its place."""


@contextmanager
def merged_adapters(model: nn.Module, in_place: bool = False) -> Iterator[None]:
    """Merge a model's LoRA adapters into their base weights for the length of a `with` block.

    One product instead of three in each layer. Afterwards the base weights are what they were to the last bit; the
    memory of the adapted weights is needed twice meanwhile. Another model that shares the parameters must not run
    inside the block. Left as they are: adapters of weights in half precision, whose rounding would swallow
    the change; of weights that other layers use, or that are sharded; adapters that are merged already; and those that
    are neither LoRA nor DoRA.

    Args:
        model: any model; nothing happens without adapters.
        in_place: merged weights lie where the base weights did, for a recorded graph reads them there; otherwise they
            are other tensors, which saves a copy.
    """
    layers = _mergeable(model)
    weights = [layer.get_base_layer().weight for layer in layers]
    kept = [weight.data.clone() if in_place else weight.data for weight in weights]

    def set_weight(weight: nn.Parameter, data: Tensor) -> None:
        if in_place:
            weight.data.copy_(data)
        else:
            weight.data = data

    try:
        with torch.no_grad():
            for layer, weight in zip(layers, weights, strict=True):
                set_weight(weight, _merged_weight(layer, weight.data, dict(layer.named_parameters())))
                layer.merged_adapters.extend(layer.active_adapters)
        yield
    finally:
        for layer, weight, data in zip(layers, weights, kept, strict=True):
            set_weight(weight, data)
            layer.merged_adapters.clear()


class PlainWeight(NamedTuple):
    """Where a weight of the plain model comes from.

    Attributes:
        sources: names of the model's own weights that it takes.
        merge: makes it from those, by their names; None where it is the one source as it stands.
    """

    sources: tuple[str, ...]
    merge: Callable[[Mapping[str, Tensor]], Tensor] | None = None

    @torch.no_grad()
    def of(self, weights: Mapping[str, Tensor]) -> Tensor:
        """The weight; a tensor without an adapter is that of `weights` itself.

        Args:
            weights: the sources, by name.
        """
        return weights[self.sources[0]] if self.merge is None else self.merge(weights)


def plain_weights(model: nn.Module, names: Iterable[str], merged: bool = True) -> dict[str, PlainWeight]:
    """The weights of the plain model that computes what this one does, each by itself: none needs all the others.

    Args:
        model: with adapters or without.
        names: of its state dict.
        merged: add the adapters; without, the weights are those that adapters stand on.

    Returns:
        By the names of the plain model, in the order of `names`.
    """
    layers = dict(lora_layers(model))
    made = dict(_merged(name, layer) for name, layer in layers.items()) if merged else {}
    plain = {}
    for name in names:
        if (place := _plain_name(name, layers)) is not None:
            plain[place] = made.get(name, PlainWeight((name,)))
    return plain


def merged_state(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """State dict of the plain model that computes what this one does: adapters are added to their weights.

    Works on a copy of the weights, not on the model, so that training goes on from weights untouched to the last bit.

    Args:
        model: with adapters or without.
        weights: its state dict, for instance from `consolidated_state_dict`; names as in `model.state_dict()`.

    Returns:
        Names and types of the plain model; tensors without an adapter are those of `weights`.
    """
    return {name: weight.of(weights) for name, weight in plain_weights(model, weights).items()}


def adapter_names(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Which weights of a model are those of its adapters.

    Args:
        model: with adapters or without.
        names: of its state dict.
    """
    layers = dict(lora_layers(model))
    return [name for name in names if _plain_name(name, layers) is None]


def _plain_name(name: str, layers: Mapping[str, Any]) -> str | None:
    """What the plain model calls a weight; None for one of an adapter."""
    parts, kept = name.split("."), []
    for depth, part in enumerate(parts):
        inside = ".".join(parts[:depth]) in layers
        if inside and part != _BASE:
            return None
        if not inside:
            kept.append(part)
    return ".".join(kept)


def _merged(name: str, layer: Any) -> tuple[str, PlainWeight]:
    """The base weight of a layer with adapters, and how it is merged."""
    if isinstance(layer, ParamWrapper):
        inner: Any = layer
        base = name
        while isinstance(inner, ParamWrapper):  # wrappers of one module stand in each other
            inner, base = inner.base_layer, f"{base}.{_BASE}"
        base = f"{base}.{layer.parameter_name}"
        merge = partial(_merge_parameter, name, layer, getattr(inner, "is_transposed", False), base)
    else:
        base, merge = f"{name}.{_BASE}.weight", partial(_merge_layer, name, layer)
    parts = [f"lora_{side}.{adapter}.weight" for adapter in layer.active_adapters for side in "AB"]
    parts += [f"lora_magnitude_vector.{adapter}.weight" for adapter in layer.active_adapters if layer.use_dora[adapter]]
    return base, PlainWeight((base, *(f"{name}.{part}" for part in parts)), merge)


def _merge_layer(name: str, layer: Any, weights: Mapping[str, Tensor]) -> Tensor:
    parts = {key.removeprefix(f"{name}."): tensor for key, tensor in weights.items() if key.startswith(f"{name}.")}
    return _merged_weight(layer, parts[f"{_BASE}.weight"], parts)


def _merge_parameter(
    name: str, wrapper: Any, is_transposed: bool, base_name: str, weights: Mapping[str, Tensor]
) -> Tensor:
    """Merge adapters of a bare parameter, such as fused experts."""
    base = weights[base_name]
    dtype = torch.promote_types(base.dtype, torch.float32)
    experts, weight = wrapper.num_experts, base.to(dtype)  # [E, out, in], or as the model holds it
    for adapter in wrapper.active_adapters:
        a, b = (weights[f"{name}.lora_{side}.{adapter}.weight"].to(dtype) for side in "AB")
        a, b = a.unflatten(0, (experts, -1)), b.unflatten(1, (-1, experts))  # [E, r, in], [out, r, E]
        change = torch.einsum("ore,eri->eoi", b, a) * wrapper.scaling[adapter]  # [E, out, in]
        if base.dim() == 3 and is_transposed:  # [E, in, out]
            change = change.transpose(1, 2)
        weight = weight + change.reshape(base.shape)
    return weight.to(base.dtype).contiguous()


def _merged_weight(layer: Any, base: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
    """The base weight, its adapters added; `parts` are the layer's tensors by their names in it."""
    dtype = torch.promote_types(base.dtype, torch.float32)
    weight = base.to(dtype).T if layer.fan_in_fan_out else base.to(dtype)  # [out, in]
    for name in layer.active_adapters:
        a, b = (parts[f"lora_{side}.{name}.weight"].to(dtype) for side in "AB")  # [r, in], [out, r]
        weight = weight + layer.scaling[name] * (b @ a)  # [out, in]
        if layer.use_dora[name]:
            magnitude = parts[f"lora_magnitude_vector.{name}.weight"].to(dtype)  # [out]
            weight = weight * (magnitude / weight.norm(dim=1)).unsqueeze(1)
    return (weight.T if layer.fan_in_fan_out else weight).to(base.dtype).contiguous()


def _mergeable(model: nn.Module) -> list[Any]:
    if is_sharded(model):
        return []
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    layers = []
    for _, layer in lora_layers(model):
        base: Any = layer.get_base_layer()
        if layer.merged or layer.disable_adapters or type(base) not in (nn.Linear, Conv1D):
            continue
        if _is_usual(layer) and _is_plain(base.weight) and owners[id(base.weight)] == 1:
            layers.append(layer)
    return layers


def _is_usual(layer: Any) -> bool:
    """Whether all its adapters are LoRA or DoRA, and none adds to the bias."""
    return all(
        name in layer.lora_A and not layer.lora_bias[name] and (name not in layer.lora_variant or layer.use_dora[name])
        for name in layer.active_adapters
    )


def _is_plain(weight: Tensor) -> bool:
    of_its_own = type(weight) is nn.Parameter and type(weight.data) is Tensor and not is_sharded(weight)
    return weight.dtype in (torch.float32, torch.float64) and of_its_own
