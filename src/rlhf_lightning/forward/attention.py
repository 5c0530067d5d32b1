"""Attention functions of our own, in a transformers model for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

UNUSUAL = ("softcap", "position_bias", "s_aux", "cache")
"""Arguments that only some families give their attention function; ours know nothing of them."""


@contextmanager
def attention_function(
    model: PreTrainedModel, name: str, attend: Callable[..., Any], make_mask: Callable[..., Any]
) -> Iterator[None]:
    """Put a function in the place of transformers' `sdpa` for the length of a `with` block.

    Args:
        model: nothing changes where it takes no attention functions, or uses another one.
        name: what the model's configs call the function meanwhile.
        attend: the function.
        make_mask: makes the mask that it is given.
    """
    configs: list[Any] = []
    if model._supports_attention_backend:
        owners = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
        configs = [c for c in owners.values() if getattr(c, "_attn_implementation", None) == "sdpa"]
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, make_mask)
    try:
        for config in configs:
            config._attn_implementation = name
        yield
    finally:
        for config in configs:
            config._attn_implementation = "sdpa"
        # What is registered stays so, with all that it holds on to: caches and masks.
        AttentionInterface.register(name, sdpa_attention_forward)
