"""What a model has room for: tokens of a text, and ids of a vocabulary.

Notation: B batch, T padded length.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_lightning.errors import UserError

_CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length", "seq_length")

LOOKUP_ERRORS = (IndexError, RuntimeError)
"""What a model raises that is given an id or a position beyond its own."""


def context_length(config: Any) -> int | None:
    """Most tokens of a text that a model is made for; None where it has no limit (ALiBi) or names none.

    Rotary positions that are scaled reach further than those it was first trained with.

    Args:
        config: a model's.

    Example:
        >>> from transformers import GPT2Config
        >>> context_length(GPT2Config(n_positions=128))
        128
    """
    text = config.get_text_config()
    if getattr(text, "alibi", False) or text.model_type == "bloom":
        return None
    found = (getattr(text, name, None) for name in _CONTEXT_NAMES)
    context = next((value for value in found if isinstance(value, int) and value > 0), None)
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None)
    if context is None or not isinstance(rope, dict):
        return context
    kinds = [rope, *(value for value in rope.values() if isinstance(value, dict))]  # one, or one of each kind of layer
    reaches = [(kind.get("original_max_position_embeddings") or context) * (kind.get("factor") or 1) for kind in kinds]
    return max(context, *map(int, reaches))


def explain_lookup(error: Exception, model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> None:
    """Say in one line which id or position a model has no row for, if that is why it failed.

    Args:
        error: what running the model ended in; one of `LOOKUP_ERRORS`.
        model: the model.
        input_ids: what it read, `[B, T]`, int64.
        attention_mask: True for real tokens, `[B, T]`, bool; all that had been read, if more than T.

    Raises:
        UserError: an id or a position is beyond the model's.
    """
    if isinstance(error, torch.OutOfMemoryError) or input_ids.device.type != "cpu":  # elsewhere all is lost by now
        return
    rows, largest = embedding_rows(model), int(input_ids.max())
    context, longest = context_length(model.config), int(attention_mask.sum(dim=1).max())
    if largest >= rows:
        raise UserError(f"the model has {rows} embeddings but is given the id {largest}; {RESIZE}") from error
    if context is not None and longest > context:
        raise UserError(
            f"a text of {longest} tokens is beyond the {context} positions of {type(model).__name__}: lower "
            "max_length, max_prompt_length or sampling.max_new_tokens"
        ) from error


RESIZE = (
    "its tokenizer has tokens that the model lacks: use the model's own tokenizer, or add rows for them with "
    "model.resize_token_embeddings(len(tokenizer)) and save the model"
)
"""What to do about it."""


def embedding_rows(model: PreTrainedModel) -> int:
    """Ids that a model has an embedding for."""
    embeddings: Any = model.get_input_embeddings()
    return int(embeddings.num_embeddings)
