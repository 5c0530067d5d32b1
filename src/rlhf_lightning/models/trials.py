"""Trying out whether a model computes the same when its sequences are laid out another way.

Several sequences in one row (packed, sharing a prefix, without padding) are right for most families and wrong for some.
What can be looked up is looked up; then a few made-up tokens are computed both ways.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

ORDINARY_LAYERS = frozenset({"full_attention", "sliding_attention"})
"""Kinds of layers, as configs name them, of which every other kind carries a state or cuts the row into pieces."""

_FULL_PRECISION, _LOW_PRECISION = 1e-3, 0.1  # rounding stays far below, a leak is of order 1


def tolerance(model: PreTrainedModel) -> float:
    """How far hidden states may be apart, relative to their norm, and still be called the same.

    Args:
        model: the model that computed them, under the same autocast.
    """
    is_low = model.dtype != torch.float32 or torch.is_autocast_enabled(model.device.type)
    return _LOW_PRECISION if is_low else _FULL_PRECISION


def relative_distance(found: Tensor, expected: Tensor) -> float:
    """The largest distance of any token's hidden states, relative to their norm.

    Args:
        found: `[..., D]`.
        expected: `[..., D]`.

    Example:
        >>> relative_distance(torch.tensor([[3.0, 0.0], [0.0, 2.0]]), torch.tensor([[4.0, 0.0], [0.0, 2.0]]))
        0.25
    """
    found, expected = found.float(), expected.float()
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


def unusual_layers(model: PreTrainedModel) -> list[str]:
    """Kinds of the model's layers that are not ordinary attention, sorted.

    Args:
        model: any Hugging Face model.
    """
    return sorted(set(getattr(model.config.get_text_config(), "layer_types", None) or []) - ORDINARY_LAYERS)


def feels_window(model: PreTrainedModel, sequence: int, row: int | Tensor) -> bool:
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
