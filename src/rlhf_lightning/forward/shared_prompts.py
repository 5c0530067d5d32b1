"""Several responses to one prompt, which goes through a model once for all of them.

Notation: B responses, G rows that hold a prompt and its responses, K responses of a row at most, P padded prompt
length, R padded response length, T = P + R, L padded length of a row, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_lightning.forward.prefix import SharedRows, share_rows


class SharedPrompts(NamedTuple):
    """B responses as G rows, and where in them is what their tokens are predicted from.

    Attributes:
        rows: each a prompt, then its responses.
        before: place of the token before each response token, among the `G * L` of all rows, `[B, R]`, int64. Before a
            first token that is the prompt's last, one place for all responses to it.
        ends: place of the last token of each response, likewise, `[B]`, int64.
    """

    rows: SharedRows
    before: Tensor
    ends: Tensor

    @classmethod
    def of(
        cls, sequences: Tensor, sequence_mask: Tensor, response_mask: Tensor, groups: Sequence[int]
    ) -> SharedPrompts:
        """Lay responses out.

        Args:
            sequences: prompts padded on the left, then responses padded on the right, `[B, T]`, int64.
            sequence_mask: True for real tokens, `[B, T]`, bool.
            response_mask: True for response tokens, `[B, R]`, bool.
            groups: how many of the next responses have one prompt, G numbers that are B together.
        """
        lengths = sequence_mask.sum(dim=1)  # [B]
        members = torch.arange(max(groups)) < torch.tensor(groups).unsqueeze(1)  # [G, K]
        here = [some.to(sequences.device) for some in members.nonzero(as_tuple=True)]  # group and member, [B] each
        ids, kept = _padded_on_the_right(sequences, sequence_mask)
        rows = share_rows(_placed(ids, here, members.shape), _placed(kept, here, members.shape))
        length = rows.ids.shape[1]
        places = rows.places[here[0], here[1]] + here[0].unsqueeze(1) * length  # [B, T]
        first = (lengths - response_mask.sum(dim=1)).unsqueeze(1) - 1  # [B, 1], the last token of the prompt
        before = places.gather(1, first + torch.arange(response_mask.shape[1], device=first.device))  # [B, R]
        # Padding reads anything. One place for all of it would get all their gradients, one after the other.
        anything = torch.arange(before.numel(), device=first.device).view_as(before) % (len(groups) * length)
        before = torch.where(response_mask, before, anything)
        return cls(rows, before, places.gather(1, lengths.unsqueeze(1) - 1).squeeze(1))

    def response_hidden(self, model: PreTrainedModel) -> Tensor:
        """As `hidden.response_hidden`, `[B, R, D]`.

        Args:
            model: one that passes `prefix.sharing_obstacle`.
        """
        return self.rows.hidden_states(model).flatten(0, 1)[self.before]

    def last_hidden(self, model: PreTrainedModel) -> Tensor:
        """Hidden states of the last token of each response, `[B, D]`.

        Args:
            model: as for `response_hidden`.
        """
        return self.rows.hidden_states(model).flatten(0, 1)[self.ends]


def _padded_on_the_right(sequences: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Ids and mask without padding on the left, `[B, T]` both."""
    width = mask.shape[1]
    token = torch.arange(width, device=mask.device)  # [T]
    begins = mask.long().argmax(dim=1, keepdim=True)  # [B, 1]
    return sequences.gather(1, (begins + token).clamp(max=width - 1)), token < mask.sum(dim=1, keepdim=True)


def _placed(values: Tensor, here: list[Tensor], shape: Sequence[int]) -> Tensor:
    """Values `[B, T]` at their groups and members, `[G, K, T]`, 0 where a group has fewer."""
    return values.new_zeros(*shape, values.shape[1]).index_put((here[0], here[1]), values)


def same_prompts(prompt_ids: Tensor, prompt_mask: Tensor) -> list[int]:
    """For each row the first row with the same prompt, whatever the padding holds.

    Args:
        prompt_ids: padded on the left, `[B, P]`, int64.
        prompt_mask: True for real tokens, `[B, P]`, bool.

    Example:
        >>> ids = torch.tensor([[0, 5], [4, 5], [9, 5]])
        >>> same_prompts(ids, torch.tensor([[False, True], [True, True], [False, True]]))
        [0, 1, 0]
    """
    real = torch.where(prompt_mask, prompt_ids, -1)  # on the left, so equal rows are equal prompts
    first: dict[int, int] = {}
    numbers: list[int] = torch.unique(real, dim=0, return_inverse=True)[1].tolist()
    return [first.setdefault(number, row) for row, number in enumerate(numbers)]
