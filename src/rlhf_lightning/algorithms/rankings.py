"""Rankings of several responses, each of which goes through the model once whatever number of pairs it stands in.

As InstructGPT does it (Ouyang et al. 2022, section 3.5): all pairs of a prompt's responses are one element of a batch.
Shuffled into separate steps they over-fit, as each response would be learnt from K - 1 times an epoch; and K responses
are read in place of the K (K - 1) sides of their pairs.

Notation: B prompts, K responses of a prompt at most, M pairs of a prompt at most; N pairs and S responses of all
prompts together, C of them chosen in some pair; T padded length.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_lightning.batches import PreferenceBatch, RankingBatch
from rlhf_lightning.host import alike, on_host, to_device


class Responses(NamedTuple):
    """The responses of a batch of rankings one after the other, and where the pairs find theirs.

    Attributes:
        ids: prompt and response, `[S, T]`, int64.
        mask: True for real tokens, `[S, T]`, bool.
        prompt_lengths: tokens of each one's prompt, `[S]`, int64; None where that is not known.
        places: of each among the B * K of the batch, `[S]`, int64.
        sides: numbers of the chosen and of the rejected response of each pair, `[N, 2]`, int64.
        chosen: numbers of those that are chosen in some pair, each once, `[C]`, int64.
        chosen_of: which of these each pair's chosen one is, `[N]`, int64.
    """

    ids: Tensor
    mask: Tensor
    prompt_lengths: Tensor | None
    places: Tensor
    sides: Tensor
    chosen: Tensor
    chosen_of: Tensor


def responses_of(batch: RankingBatch) -> Responses:
    """The responses of a batch, which waits for the device only if the host does not know it.

    Args:
        batch: B prompts.
    """
    device, (groups, count, _) = batch.input_ids.device, batch.input_ids.shape
    mask, pairs = on_host(batch.attention_mask, batch.pairs)
    places = mask.any(dim=2).flatten().nonzero().squeeze(1)  # [S]
    numbers = torch.full((groups * count,), -1).index_copy(0, places, torch.arange(len(places)))
    first = torch.arange(groups).view(-1, 1, 1) * count  # [B, 1, 1]
    sides = numbers[(first + pairs)[_is_pair(pairs)]]  # [N, 2]
    chosen, chosen_of = sides[:, 0].unique(return_inverse=True)
    there, sides, chosen, chosen_of = (to_device(each, device) for each in (places, sides, chosen, chosen_of))
    lengths = batch.prompt_lengths
    if lengths is not None:
        lengths = alike(_taken, lengths, to_device(places // count, device))
    ids, real = (alike(_taken, alike(_in_turn, each), there) for each in (batch.input_ids, batch.attention_mask))
    return Responses(ids, real, lengths, there, sides, chosen, chosen_of)


def pairs_of(batch: RankingBatch, responses: Responses | None = None) -> PreferenceBatch:
    """All pairs of a batch, prompt by prompt, each with the weight that it has in its ranking.

    Args:
        batch: B prompts.
        responses: from `responses_of`, if they are there.
    """
    responses = responses_of(batch) if responses is None else responses
    (pairs,) = on_host(batch.pairs)
    is_pair = _is_pair(pairs)
    prompts, numbers = (to_device(each, batch.row_ids.device) for each in is_pair.nonzero(as_tuple=True))  # [N] each

    weights, lengths = batch.weights, batch.prompt_lengths
    if weights is None:
        weights = to_device((is_pair / is_pair.sum(dim=1, keepdim=True)).float(), batch.row_ids.device)
    chosen, rejected = (alike(partial(_column, number=number), responses.sides) for number in (0, 1))
    return PreferenceBatch(
        chosen_ids=alike(_taken, responses.ids, chosen),
        chosen_mask=alike(_taken, responses.mask, chosen),
        rejected_ids=alike(_taken, responses.ids, rejected),
        rejected_mask=alike(_taken, responses.mask, rejected),
        row_ids=alike(_taken, batch.row_ids, prompts),
        margins=None if batch.margins is None else batch.margins[prompts, numbers],
        weights=weights[prompts, numbers],
        prompt_lengths=None if lengths is None else alike(_taken, lengths, prompts),
    )


def _is_pair(pairs: Tensor) -> Tensor:
    """True where there is a pair, `[B, M]`, bool."""
    return pairs[:, :, 0] >= 0


def _taken(values: Tensor, places: Tensor) -> Tensor:
    return values[places]


def _in_turn(values: Tensor) -> Tensor:
    return values.flatten(0, 1)


def _column(values: Tensor, number: int) -> Tensor:
    return values[:, number]
