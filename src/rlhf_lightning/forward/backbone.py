"""Running a transformer without its output layer, and what is to be known of its layers.

Notation: B batch, T padded length, D hidden size.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

HEAD = "score"
"""Name of a classifier's output layer."""

ORDINARY_LAYERS = frozenset({"full_attention", "sliding_attention"})
"""Kinds of layers, as configs name them, of which every other kind carries a state or cuts the row into pieces."""


def position_ids(attention_mask: Tensor) -> Tensor:
    """Positions that count real tokens only, so that padding on the left changes nothing.

    Args:
        attention_mask: True for real tokens, `[B, T]`, bool.

    Returns:
        `[B, T]`, int64, 0 on padding.

    Example:
        >>> import torch
        >>> position_ids(torch.tensor([[False, True, True]]))
        tensor([[0, 0, 1]])
    """
    return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)  # [B, T]


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode for the length of a `with` block."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def takes_positions(model: PreTrainedModel) -> bool:
    """Whether the backbone can be told each token's position."""
    return "position_ids" in inspect.signature(model.base_model.forward).parameters


_CACHE_NAMES = ("past_key_values", "cache", "cache_params")


def cache_argument(model: PreTrainedModel) -> str:
    """What the backbone calls the cache that it is given; transformers 5.24 calls every one `cache`."""
    parameters = inspect.signature(model.base_model.forward).parameters
    return next((name for name in _CACHE_NAMES if name in parameters), _CACHE_NAMES[0])


def attends(model: PreTrainedModel) -> bool:
    """Whether any layer looks at earlier tokens. Where each keeps a state instead, a mask is of the new tokens."""
    kinds = getattr(model.config.get_text_config(), "layer_types", None)
    return set(kinds or []) != {"linear_attention"} and cache_argument(model) != "cache_params"


def unusual_layers(model: PreTrainedModel) -> list[str]:
    """Kinds of the model's layers that are not ordinary attention, sorted.

    Args:
        model: any Hugging Face model.
    """
    return sorted(set(getattr(model.config.get_text_config(), "layer_types", None) or []) - ORDINARY_LAYERS)


def exceeds_sliding_window(model: PreTrainedModel, sequence: int, row: int | Tensor) -> bool:
    """Whether some layer's window is shorter than what one's own mask would let it see.

    Args:
        model: any Hugging Face model.
        sequence: tokens of the longest sequence.
        row: places of the longest row, in which several sequences may stand; a tensor is looked at only if it matters.
    """
    config = model.config.get_text_config()
    layers = getattr(config, "layer_types", None) or ["sliding_attention"]
    window = getattr(config, "sliding_window", None) if "sliding_attention" in layers else None
    if window is not None and sequence > window:
        return True
    window = getattr(config, "window_size", None)  # GPT-Neo counts places in the row, not positions
    return window is not None and bool(row > window)


def run_backbone(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, **kwargs: Any) -> Any:
    """Run the transformer without its output layer, padding and all.

    Args:
        model: any Hugging Face model with a backbone and a head.
        input_ids: `[B, T]`, int64.
        attention_mask: True for real tokens, `[B, T]`, bool; longer than T when a cache is passed.
        **kwargs: handed to the backbone, for instance `use_cache`.

    Returns:
        The backbone's output; its `last_hidden_state` is `[B, T, D]`.
    """
    if takes_positions(model):
        kwargs["position_ids"] = position_ids(attention_mask)[:, -input_ids.shape[1] :]  # [B, T]
    kwargs.setdefault("use_cache", False)
    return model.base_model(input_ids=input_ids, attention_mask=attention_mask.long(), **kwargs)
