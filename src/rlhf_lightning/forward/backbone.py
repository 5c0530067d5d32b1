"""Running a transformer without its output layer.

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


def is_checkpointing(model: PreTrainedModel) -> bool:
    """Whether activations are computed again in the backward pass."""
    # transformers 5.23 has the second name and warns of the first.
    name = (
        "is_activation_checkpointing" if hasattr(model, "is_activation_checkpointing") else "is_gradient_checkpointing"
    )
    return bool(getattr(model, name, False))


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
