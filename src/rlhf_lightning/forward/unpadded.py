"""Padding that is not computed: the real tokens of a batch as one row, attention sequence by sequence.

Everything in a transformer but attention looks at one token at a time, so the real tokens of all sequences can go
through it as one long row, without padding and in one large matrix product. Attention then takes the row apart again.
For CPUs, where arithmetic is dear and a further call is cheap; elsewhere the batch stays as it is.

Not every model can: attention must be one of transformers' exchangeable functions, and nothing else may look at several
tokens. Whether a model can is looked up where it is known, then tested, once.

Notation: B sequences, T padded length, N real tokens, D hidden size, H heads of d numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from rlhf_lightning.compat import (
    SDPA,
    UNUSUAL_ARGUMENTS,
    attention_function,
    attention_kernel,
    sdpa_attention_forward,
    takes_attention_functions,
)
from rlhf_lightning.forward.backbone import (
    cache_argument,
    is_checkpointing,
    position_ids,
    run_backbone,
    takes_positions,
)
from rlhf_lightning.forward.numerics import (
    dummy_tokens,
    exceeds_sliding_window,
    relative_distance,
    say_once,
    self_test,
    tolerance,
    unusual_layers,
)

NAME = "rlhf_lightning_unpadded"
"""What transformers' configs call the attention while it is in use."""

DEVICES = {"cpu"}

_LEAST_PADDING = 1 / 16  # less is not worth taking the batch apart
_can_run: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


def unpadded_hidden_states(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    positions: Tensor,
    lengths: Sequence[int] | None = None,
    sees: Sequence[Tensor] | None = None,
) -> Tensor | None:
    """Last hidden states without computing the padding.

    Args:
        model: a language model or a scalar model.
        input_ids: `[B, T]`, int64.
        attention_mask: True for real tokens, `[B, T]`, bool, padded on either side.
        positions: place of each token in its own sequence, `[B, T]`, int64.
        lengths: tokens of each sequence, N together, in the order of the rows; None if every row is one sequence.
        sees: which tokens of its sequence each token attends to, for each sequence `[1, 1, length, length]`, bool; None
            for those before it.

    Returns:
        `[B, T, D]`, 0 on padding; None where the model cannot do it, or there is too little to gain.
    """
    # What depends on the batch comes last: on ZeRO-3 every process must test the model, or none.
    if not can_unpad(model, attention_mask.device) or not _runs(model):
        return None
    if lengths is None:
        lengths = [length for length in attention_mask.sum(dim=1).tolist() if length]
        if sum(lengths) > (1 - _LEAST_PADDING) * attention_mask.numel():
            return None
    if exceeds_sliding_window(model, max(lengths), max(lengths)):
        return None
    return _run(model, input_ids, attention_mask, positions, lengths, sees)


def _run(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    positions: Tensor,
    lengths: Sequence[int],
    sees: Sequence[Tensor] | None,
) -> Tensor:
    real = attention_mask.flatten().nonzero().squeeze(1)  # [N], places among B * T
    hidden = _run_row(model, input_ids.flatten()[real], positions.flatten()[real], lengths, sees, use_cache=False)
    empty = hidden.new_zeros(attention_mask.numel(), hidden.shape[1])  # [B * T, D]
    return empty.index_copy(0, real, hidden).unflatten(0, tuple(attention_mask.shape))  # [B, T, D]


def _run_row(
    model: PreTrainedModel,
    ids: Tensor,
    positions: Tensor,
    lengths: Sequence[int],
    sees: Sequence[Tensor] | None,
    **kwargs: Any,
) -> Tensor:
    """Hidden states of real tokens, `[N, D]`; ids and positions are `[N]`, the rest as in `unpadded_hidden_states`."""
    attend = partial(_attend, list(lengths), sees)
    with attention_function(model, NAME, attend, lambda *args, **kwargs: None):
        row = {"input_ids": ids[None], "position_ids": positions[None], "attention_mask": None}
        hidden: Tensor = model.base_model(**row, **kwargs).last_hidden_state[0]  # [N, D]
    return hidden


def reads_rows(model: PreTrainedModel, lengths: Sequence[int]) -> bool:
    """Whether `read_row` may be called for prompts of these lengths; the model is tested whatever they are.

    Args:
        model: a language model.
        lengths: of the prompts.
    """
    if not can_unpad(model, model.device) or not _runs(model):
        return False
    longest = max(lengths)
    return min(lengths) > 0 and not exceeds_sliding_window(model, longest, longest)


def read_row(model: PreTrainedModel, ids: Tensor, lengths: Sequence[int], cache: Cache) -> Tensor:
    """Read prompts into a cache, one after the other as one row.

    Args:
        model: a language model for which `reads_rows`.
        ids: the tokens of all prompts, `[N]`, int64.
        lengths: of the prompts, N together.
        cache: takes the row apart.

    Returns:
        Hidden states at their ends, `[prompts, D]`.
    """
    positions = torch.cat([torch.arange(length, device=ids.device) for length in lengths])  # [N]
    hidden = _run_row(model, ids, positions, lengths, None, use_cache=True, **{cache_argument(model): cache})
    return hidden[torch.tensor(lengths, device=ids.device).cumsum(dim=0) - 1]


def can_unpad(model: PreTrainedModel, device: torch.device) -> bool:
    """Whether it is worth asking; elsewhere counting the tokens would only make the device wait.

    Args:
        model: a language model or a scalar model.
        device: where the batch lies.
    """
    # What is computed again in the backward pass would find the attention changed back.
    again = torch.is_grad_enabled() and is_checkpointing(model)
    return device.type in DEVICES and attention_kernel(model) == SDPA and not again


def _attend(
    lengths: list[int],
    sees: Sequence[Tensor] | None,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers: query `[1, H, N, d]`, key and value `[1, key heads, N, d]`."""
    if attention_mask is not None or any(kwargs.get(name) is not None for name in UNUSUAL_ARGUMENTS):
        raise NotImplementedError("attention of another kind")
    masks = [None] * len(lengths) if sees is None else sees
    # Each sequence's part is [1, heads, length, d]; what comes of it [1, length, H, d].
    parts = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), masks, strict=True)
    return torch.cat([sdpa_attention_forward(module, *part, **kwargs)[0] for part in parts], dim=1), None


def _runs(model: PreTrainedModel) -> bool:
    if model not in _can_run:
        obstacle = unpadding_obstacle(model)
        if obstacle is not None:
            say_once(f"{type(model).__name__} computes the padding of its batches, too: {obstacle}")
        _can_run[model] = obstacle is None
    return _can_run[model]


def unpadding_obstacle(model: PreTrainedModel) -> str | None:
    """Why a model cannot be run without padding; None if it can.

    Args:
        model: put in evaluation mode for a moment. Two forward passes are run unless the answer is known without.
    """
    if not takes_positions(model):
        return "it takes no position_ids"
    if getattr(model.config.get_text_config(), "alibi", False):
        return "it uses ALiBi"
    if not takes_attention_functions(model):
        return "it takes no attention functions"
    if other := unusual_layers(model):
        return f"it has layers of type '{other[0]}'"
    same = self_test(model, partial(_runs_rightly, model))
    if isinstance(same, Exception):
        return "its attention is of another kind"
    return None if same else "its hidden states would not be the same"


def _runs_rightly(model: PreTrainedModel) -> bool:
    """Whether hidden states of a few dummy tokens are those of the padded batch."""
    ids, lengths = dummy_tokens(model, 10).view(2, 5), [5, 3]
    mask = torch.arange(5, device=model.device) < torch.tensor(lengths, device=model.device).unsqueeze(1)
    found = _run(model, ids, mask, position_ids(mask), lengths, None)[mask]
    expected = run_backbone(model, ids, mask).last_hidden_state[mask]
    return relative_distance(found, expected) <= tolerance(model)
