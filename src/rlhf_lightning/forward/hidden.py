"""Hidden states and log-probabilities of padded batches, whichever way the rows are laid out meanwhile.

Everything in a transformer but attention looks at one token at a time, so the real tokens of all sequences can go
through it as one long row, without padding and in one large matrix product. Attention then takes the row apart again,
on CPUs, where a further call is cheap, sequence by sequence, on a GPU by one kernel for all of them (`varlen.py`).
Where there is none, the batch stays as it is.

Not every model can: attention must be one of transformers' exchangeable functions, and nothing else may look at several
tokens. Whether a model can is looked up where it is known, then tested, once.

Notation: B batch, T padded length, P padded prompt length, R padded response length, N real tokens of the batch, D
hidden size, H heads of d numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from rlhf_lightning.compat import (
    SDPA,
    attention_function,
    attention_kernel,
    is_checkpointing,
    outside_of_graphs,
    takes_attention_functions,
)
from rlhf_lightning.forward import varlen
from rlhf_lightning.forward.backbone import (
    cache_argument,
    exceeds_sliding_window,
    position_ids,
    run_backbone,
    takes_positions,
    unusual_layers,
)
from rlhf_lightning.forward.capacity import LOOKUP_ERRORS, explain_lookup
from rlhf_lightning.forward.compatibility import ignores_left_padding
from rlhf_lightning.forward.compiled_layers import layers_are_compiled
from rlhf_lightning.forward.numerics import dummy_tokens, relative_distance, say_once, self_test, tolerance
from rlhf_lightning.forward.output_layer import logprobs_from_hidden
from rlhf_lightning.forward.row_attention import attend_in_turn, calls_of
from rlhf_lightning.forward.varlen import runs_of
from rlhf_lightning.host import on_host, places_of

UNPADDED = "rlhf_lightning_unpadded"
"""What transformers' configs call the attention while it is in use."""

DEVICES = {"cpu"}
"""Where attention may take the rows apart one by one."""

_LEAST_PADDING = 1 / 16  # less is not worth taking the batch apart
_takes_left_padding: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()
_can_unpad: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


def takes_left_padding(model: PreTrainedModel) -> bool:
    """Whether padding on the left changes nothing; the model is tested before its first use.

    Args:
        model: a language model or a scalar model; every process must ask equally often.

    Raises:
        UserError: the model computes something else than when it is run by itself.
    """
    if model not in _takes_left_padding:
        _takes_left_padding[model] = ignores_left_padding(model)
    return _takes_left_padding[model]


def hidden_states(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, packed_positions: Tensor | None = None
) -> Tensor:
    """Last hidden states: everything before the output layer.

    Args:
        model: a language model or a scalar model.
        input_ids: `[B, T]`, int64.
        attention_mask: True for real tokens, `[B, T]`, bool, padded on either side.
        packed_positions: for packed rows, the place of each token in its own example, `[B, T]`, int64, 0 on padding;
            no example sees another (on models that pass `packed.check_packing`).

    Returns:
        `[B, T, D]`; anything finite on padding.
    """
    pads_left = takes_left_padding(model)
    try:
        hidden = unpadded_hidden_states(model, input_ids, attention_mask, packed_positions)
        if hidden is not None:
            return hidden
        if not pads_left and packed_positions is None:
            return _hidden_states_from_the_left(model, input_ids, attention_mask)
        return padded_hidden_states(model, input_ids, attention_mask, packed_positions)
    except LOOKUP_ERRORS as error:
        explain_lookup(error, model, input_ids, attention_mask)
        raise


def _hidden_states_from_the_left(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """As `hidden_states`, for models that read what stands on their left: all padding goes to the right."""
    order = attention_mask.long().argsort(dim=1, descending=True, stable=True)  # [B, T], real tokens first
    hidden = padded_hidden_states(model, input_ids.gather(1, order), attention_mask.gather(1, order))
    return hidden.gather(1, order.argsort(dim=1).unsqueeze(2).expand_as(hidden))  # [B, T, D]


def padded_hidden_states(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, packed_positions: Tensor | None = None
) -> Tensor:
    """As `hidden_states`, the padding computed too."""
    if packed_positions is None:
        return run_backbone(model, input_ids, attention_mask).last_hidden_state
    # transformers reads the borders from the positions, but only where it is given no mask. A pad at position 0 is an
    # example of its own, which nobody else sees.
    output = model.base_model(input_ids=input_ids, attention_mask=None, position_ids=packed_positions, use_cache=False)
    return output.last_hidden_state


class ResponseRows(Protocol):
    """Responses that are laid out already, such as those that share their prompts (`shared_prompts.py`)."""

    def response_hidden(self, model: PreTrainedModel) -> Tensor:
        """Hidden states from which the response tokens are predicted, `[B, R, D]`."""

    def last_hidden(self, model: PreTrainedModel) -> Tensor:
        """Hidden states of the last token of each response, `[B, D]`."""


def response_hidden(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    response_length: int,
    rows: ResponseRows | None = None,
) -> Tensor:
    """Hidden states from which the response tokens are predicted.

    Response token r sits at position P + r and is predicted from P + r - 1.

    Args:
        model: a language model or a scalar model.
        input_ids: prompts padded on the left, then responses padded on the right, `[B, P + R]`.
        attention_mask: `[B, P + R]`, bool.
        response_length: R.
        rows: the same sequences, as they are to go through the model; None for each by itself.

    Returns:
        `[B, R, D]`.
    """
    if rows is not None:
        return rows.response_hidden(model)
    return hidden_states(model, input_ids, attention_mask)[:, -response_length - 1 : -1]  # [B, R, D]


def response_logprobs(
    model: PreTrainedModel,
    sequences: Tensor,
    sequence_mask: Tensor,
    response_mask: Tensor,
    temperature: float = 1.0,
    with_entropy: bool = False,
    rows: ResponseRows | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each response token, `log pi(x[P+r] | x[<P+r])`.

    Args:
        model: a language model.
        sequences: prompts padded on the left, then responses padded on the right, `[B, P + R]`, int64.
        sequence_mask: True for real tokens, `[B, P + R]`, bool.
        response_mask: True for response tokens, `[B, R]`, bool.
        temperature: the sampling temperature.
        with_entropy: also compute the entropy of each prediction.
        rows: as for `response_hidden`.

    Returns:
        Log-probabilities and entropies in nats, both `[B, R]`, float32, 0 after the last token; the entropies are all 0
        unless asked for.
    """
    hidden = response_hidden(model, sequences, sequence_mask, response_mask.shape[1], rows)
    return logprobs_from_hidden(model, hidden, sequences, response_mask, temperature, with_entropy)


def unpadded_hidden_states(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    positions: Tensor | None = None,
    parts: Sequence[Sequence[int]] | None = None,
) -> Tensor | None:
    """Last hidden states without computing the padding.

    Args:
        model: a language model or a scalar model.
        input_ids: `[B, T]`, int64.
        attention_mask: True for real tokens, `[B, T]`, bool, padded on either side.
        positions: place of each token in its own sequence, `[B, T]`, int64; None if every row is one sequence.
        parts: tokens of each row's beginning, then of each rest that goes on from it, N together; of a sequence by
            itself one number. None where they are read off the others.

    Returns:
        `[B, T, D]`, 0 on padding; None where the model cannot do it, or there is too little to gain.
    """
    # What depends on the batch comes last: on ZeRO-3 every process must test the model, or none.
    if not unpads(model, attention_mask.device):
        return None
    if positions is None:
        parts = [[length] for length in places_of(attention_mask).lengths if length]
        # A GPU gains by the kernel itself, which takes no mask.
        least = _LEAST_PADDING if attention_mask.device.type == "cpu" else 0
        if sum(map(sum, parts)) > (1 - least) * attention_mask.numel():
            return None
        positions = position_ids(attention_mask)  # [B, T]
    elif parts is None:
        mask, placed = on_host(attention_mask, positions)
        starts = (placed[mask] == 0).nonzero().squeeze(1)  # [sequences], places among N
        ends = torch.cat([starts[1:], mask.sum().reshape(1)])  # [sequences]
        parts = [[length] for length in (ends - starts).tolist()]
    if not parts:  # nothing but padding
        return None
    longest = max(map(sum, parts))
    if exceeds_sliding_window(model, longest, longest):
        return None
    return _run(model, input_ids, attention_mask, positions, parts)


def _run(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    positions: Tensor,
    parts: Sequence[Sequence[int]],
) -> Tensor:
    real = places_of(attention_mask).flat  # [N]
    hidden = _run_row(model, input_ids.flatten()[real], positions.flatten()[real], parts, use_cache=False)
    empty = hidden.new_zeros(attention_mask.numel(), hidden.shape[1])  # [B * T, D]
    return empty.index_copy(0, real, hidden).unflatten(0, tuple(attention_mask.shape))  # [B, T, D]


def _run_row(
    model: PreTrainedModel,
    ids: Tensor,
    positions: Tensor,
    parts: Sequence[Sequence[int]],
    **kwargs: Any,
) -> Tensor:
    """Hidden states of real tokens, `[N, D]`; ids and positions are `[N]`, the rest as in `unpadded_hidden_states`."""
    on_cpu = ids.device.type == "cpu"
    attend = partial(attend_in_turn, calls_of(parts)) if on_cpu else partial(varlen.attend, runs_of(parts, ids.device))
    # It loops over these sequences: looked into, it would be compiled anew for each batch.
    outside = outside_of_graphs(attend) if layers_are_compiled(model) else nullcontext(attend)
    with outside as function, attention_function(model, UNPADDED, function, None):
        row = {"input_ids": ids[None], "position_ids": positions[None], "attention_mask": None}
        hidden: Tensor = model.base_model(**row, **kwargs).last_hidden_state[0]  # [N, D]
    return hidden


def reads_rows(model: PreTrainedModel, lengths: Sequence[int]) -> bool:
    """Whether `read_row` may be called for prompts of these lengths; the model is tested whatever they are.

    Args:
        model: a language model.
        lengths: of the prompts.
    """
    if model.device.type != "cpu" or not unpads(model, model.device):
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
    hidden = _run_row(model, ids, positions, [[n] for n in lengths], use_cache=True, **{cache_argument(model): cache})
    return hidden[torch.tensor(lengths, device=ids.device).cumsum(dim=0) - 1]


def can_unpad(model: PreTrainedModel, device: torch.device) -> bool:
    """Whether it is worth asking; elsewhere counting the tokens would only make the device wait.

    Args:
        model: a language model or a scalar model.
        device: where the batch lies.
    """
    # What is computed again in the backward pass would find the attention changed back.
    again = torch.is_grad_enabled() and is_checkpointing(model)
    if attention_kernel(model) != SDPA or again:
        return False
    return device.type in DEVICES or varlen.has_kernel(model, device)


def unpads(model: PreTrainedModel, device: torch.device) -> bool:
    """Whether a model's batches can go without their padding; tested when first asked.

    Args:
        model: a language model or a scalar model; every process must ask equally often.
        device: where its batch lies.
    """
    return can_unpad(model, device) and _unpads(model)


def _unpads(model: PreTrainedModel) -> bool:
    if model not in _can_unpad:
        obstacle = unpadding_obstacle(model)
        if obstacle is not None:
            say_once(f"{type(model).__name__} computes the padding of its batches, too: {obstacle}")
        _can_unpad[model] = obstacle is None
    return _can_unpad[model]


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
    same = self_test(model, partial(_unpads_rightly, model))
    if isinstance(same, Exception):
        return "its attention is of another kind"
    return None if same else "its hidden states would not be the same"


def _unpads_rightly(model: PreTrainedModel) -> bool:
    """Whether hidden states of a few dummy tokens are those of the padded batch."""
    ids, lengths = dummy_tokens(model, 10).view(2, 5), [5, 3]
    mask = torch.arange(5, device=model.device) < torch.tensor(lengths, device=model.device).unsqueeze(1)
    found = _run(model, ids, mask, position_ids(mask), [[length] for length in lengths])[mask]
    expected = run_backbone(model, ids, mask).last_hidden_state[mask]
    return relative_distance(found, expected) <= tolerance(model)
