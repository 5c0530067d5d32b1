"""Hidden states and log-probabilities of padded batches, whichever way the rows are laid out meanwhile.

Notation: B batch, T padded length, P padded prompt length, R padded response length, N real tokens of the batch, D
hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_lightning.forward.backbone import position_ids, run_backbone
from rlhf_lightning.forward.capacity import LOOKUP_ERRORS, explain_lookup
from rlhf_lightning.forward.compatibility import takes_left_padding
from rlhf_lightning.forward.output_layer import token_logprobs_at
from rlhf_lightning.forward.unpadded import can_unpad, unpadded_hidden_states


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
        return _hidden_states(model, input_ids, attention_mask, packed_positions, pads_left)
    except LOOKUP_ERRORS as error:
        explain_lookup(error, model, input_ids, attention_mask)
        raise


def _hidden_states(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, packed_positions: Tensor | None, pads_left: bool
) -> Tensor:
    hidden = None
    if can_unpad(model, input_ids.device):
        positions, lengths = packed_positions, None
        if positions is None:
            positions = position_ids(attention_mask)  # [B, T]
        else:
            starts = (positions[attention_mask] == 0).nonzero().squeeze(1)  # [examples], places among N
            ends = torch.cat([starts[1:], attention_mask.sum().reshape(1)])  # [examples]
            lengths = (ends - starts).tolist()
        hidden = unpadded_hidden_states(model, input_ids, attention_mask, positions, lengths)
    if hidden is not None:
        return hidden
    if not pads_left and packed_positions is None:
        return _hidden_states_from_the_left(model, input_ids, attention_mask)
    return padded_hidden_states(model, input_ids, attention_mask, packed_positions)


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


def response_hidden(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, response_length: int) -> Tensor:
    """Hidden states from which the response tokens are predicted.

    Response token r sits at position P + r and is predicted from P + r - 1.

    Args:
        model: a language model or a scalar model.
        input_ids: prompts padded on the left, then responses padded on the right, `[B, P + R]`.
        attention_mask: `[B, P + R]`, bool.
        response_length: R.

    Returns:
        `[B, R, D]`.
    """
    return hidden_states(model, input_ids, attention_mask)[:, -response_length - 1 : -1]  # [B, R, D]


def response_logprobs(
    model: PreTrainedModel,
    sequences: Tensor,
    sequence_mask: Tensor,
    response_mask: Tensor,
    temperature: float = 1.0,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each response token, `log pi(x[P+r] | x[<P+r])`.

    Args:
        model: a language model.
        sequences: prompts padded on the left, then responses padded on the right, `[B, P + R]`, int64.
        sequence_mask: True for real tokens, `[B, P + R]`, bool.
        response_mask: True for response tokens, `[B, R]`, bool.
        temperature: the sampling temperature.
        with_entropy: also compute the entropy of each prediction.

    Returns:
        Log-probabilities and entropies in nats, both `[B, R]`, float32, 0 after the last token; the entropies are all 0
        unless asked for.
    """
    hidden = response_hidden(model, sequences, sequence_mask, response_mask.shape[1])
    return logprobs_from_hidden(model, hidden, sequences, response_mask, temperature, with_entropy)


def logprobs_from_hidden(
    model: PreTrainedModel,
    hidden: Tensor,
    sequences: Tensor,
    response_mask: Tensor,
    temperature: float = 1.0,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor]:
    """As `response_logprobs`, where the hidden states are there already.

    Args:
        model: a language model; its output layer is used.
        hidden: from `response_hidden`, `[B, R, D]`.
        sequences: prompts and responses, `[B, P + R]`, int64.
        response_mask: True for response tokens, `[B, R]`, bool.
        temperature: the sampling temperature.
        with_entropy: also compute the entropy of each prediction.
    """
    # Only real response positions meet the output matrix, a chunk at a time.
    token_ids = sequences[:, -response_mask.shape[1] :][response_mask]  # [N]
    logprobs, entropies = token_logprobs_at(model, hidden[response_mask], token_ids, temperature, with_entropy)
    zeros = torch.zeros(response_mask.shape, dtype=torch.float32, device=sequences.device)  # [B, R]
    padded = [zeros if x is None else zeros.masked_scatter(response_mask, x.float()) for x in (logprobs, entropies)]
    return padded[0], padded[1]
