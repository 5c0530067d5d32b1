"""Which responses go through a model at once, those to one prompt together where they can share it.

Notation: N responses, b responses of a piece, G groups of responses to one prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_lightning.batches import length_sorted_pieces
from rlhf_lightning.forward.backbone import exceeds_sliding_window
from rlhf_lightning.forward.hidden import unpads
from rlhf_lightning.forward.prefix import can_share, cost
from rlhf_lightning.forward.row_attention import RESTS_IN_ONE_CALL
from rlhf_lightning.forward.shared_prompts import SharedPrompts, same_prompts
from rlhf_lightning.host import alike, on_host, to_device


class Piece(NamedTuple):
    """Responses that go through a model at once.

    Attributes:
        rows: which, `[b]`, int64.
        groups: how many of the next ones share their prompt, G numbers that are b together; None where each response
            goes with a prompt of its own.
    """

    rows: Tensor
    groups: tuple[int, ...] | None = None

    def laid_out(self, sequences: Tensor, sequence_mask: Tensor, response_mask: Tensor) -> SharedPrompts | None:
        """How they go through a model; None for each by itself.

        Args:
            sequences: those of `rows`, prompts padded on the left, responses on the right, `[b, P + R]`, int64.
            sequence_mask: True for real tokens, `[b, P + R]`, bool.
            response_mask: True for response tokens, `[b, R]`, bool.
        """
        return None if self.groups is None else SharedPrompts.of(sequences, sequence_mask, response_mask, self.groups)


def cut_responses(
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    response_mask: Tensor,
    size: int | None,
    max_tokens: int | None,
    min_pieces: int = 1,
    sharing: Sequence[PreTrainedModel] = (),
) -> list[Piece]:
    """Cut responses into pieces, the longest first.

    Where prompts are shared, the responses to one stay together as far as the limits allow, and a prompt counts once in
    the tokens of a piece. It depends on nothing but what is given.

    Args:
        prompt_ids: padded on the left, `[N, P]`, int64.
        prompt_mask: True for real tokens, `[N, P]`, bool.
        response_mask: `[N, R]`, bool.
        size: responses in a piece at most; None for no such limit.
        max_tokens: tokens of a piece at most, padding included, save that a longer response goes alone; None for no
            such limit.
        min_pieces: pieces at least, at most N.
        sharing: models that are to read the pieces with every prompt only once, if all of them can and it pays; none to
            run each response with its own. Every process must give the same.
    """
    masks = prompt_mask, response_mask
    lengths = alike(lambda *masks: torch.stack([mask.sum(dim=1) for mask in masks], dim=1), *masks)  # [N, 2]
    # Each process tests every model, whatever its responses are: under ZeRO-3 all run a model, or none.
    able = [can_share(model) for model in sharing]
    padded = [not unpads(model, prompt_ids.device) for model in sharing]
    if sharing and all(able):
        found = _Sharing(on_host(lengths)[0].tolist(), size, max_tokens)
        pieces = found.pieces(same_prompts(prompt_ids, prompt_mask))
        # Decided on as few pieces as there may be: asked for more of them, a process must not change its mind.
        apart = [piece.tolist() for piece in length_sorted_pieces(lengths, size, max_tokens)]
        if all(found.pays(model, pieces, apart, pads) for model, pads in zip(sharing, padded, strict=True)):
            while len(pieces) < min_pieces:
                found.halve_largest(pieces)
            return [_piece(groups, prompt_ids.device) for groups in pieces]
    return [Piece(rows) for rows in length_sorted_pieces(lengths, size, max_tokens, min_pieces)]


def _piece(groups: list[list[int]], device: torch.device) -> Piece:
    return Piece(to_device(torch.tensor([*chain.from_iterable(groups)]), device), tuple(map(len, groups)))


class _Sharing(NamedTuple):
    """How responses share prompts.

    A group is a list of responses to one prompt, a piece a list of groups.

    Attributes:
        lengths: tokens of each prompt and of its response, N pairs.
        size: responses in a piece at most, or None.
        max_tokens: tokens in a piece at most, or None.
    """

    lengths: list[list[int]]
    size: int | None
    max_tokens: int | None

    def tokens(self, group: list[int]) -> int:
        """Tokens of a group, its prompt counted once."""
        return self.lengths[group[0]][0] + sum(self.lengths[row][1] for row in group)

    def whole(self, row: int) -> int:
        """Tokens of a prompt and its response."""
        return sum(self.lengths[row])

    def groups(self, prompts: list[int]) -> list[list[int]]:
        """As few as keep to the limits, those of most tokens first.

        Args:
            prompts: of each response; equal numbers stand for equal prompts.
        """
        made: list[list[int]] = []
        last: dict[int, list[int]] = {}
        for row, prompt in enumerate(prompts):
            group = last.get(prompt)
            if group is None or not self._fits(len(group) + 1, self.tokens([*group, row])):
                last[prompt] = [row]
                made.append(last[prompt])
            else:
                group.append(row)
        return sorted(made, key=self.tokens, reverse=True)

    def pieces(self, prompts: list[int]) -> list[list[list[int]]]:
        """Each group in the first piece that has room for all of it, the longest first.

        Args:
            prompts: as for `groups`.
        """
        made: list[list[list[int]]] = []
        counts: list[int] = []  # responses of each piece
        for group in self.groups(prompts):
            fits = (
                place
                for place, piece in enumerate(made)
                if self._fits(counts[place] + len(group), (len(piece) + 1) * self.tokens(piece[0]))  # the longest
            )
            place = next(fits, len(made))
            if place == len(made):
                made.append([])
                counts.append(0)
            made[place].append(group)
            counts[place] += len(group)
        return made

    def pays(self, model: PreTrainedModel, pieces: list[list[list[int]]], apart: list[list[int]], padded: bool) -> bool:
        """Whether a model has less to do than where each response goes with a prompt of its own.

        Args:
            model: one that can share.
            pieces: responses as they would share.
            apart: the pieces in which they go otherwise.
            padded: what fills rows up to the longest is computed too.
        """
        longest, row = max(map(self.whole, chain(*apart))), max(map(self.tokens, chain(*pieces)))
        if min(prompt for prompt, _ in self.lengths) == 0 or exceeds_sliding_window(model, longest, row):
            return False
        if padded:
            together = [(width, width**2) for piece in pieces for width in [self.tokens(piece[0])] * len(piece)]
            alone = [(width, width**2) for piece in apart for width in [self._width(piece)] * len(piece)]
        else:
            together = [(self.tokens(group), self._seen(group)) for group in chain(*pieces)]
            alone = [(self.whole(row), self.whole(row) ** 2) for row in chain(*apart)]
        costs = [cost(model, *torch.tensor(rows).unbind(dim=1)).sum() for rows in (together, alone)]
        return bool(costs[0] < costs[1])

    def _seen(self, group: list[int]) -> int:
        """Pairs of tokens that attention compares in a group."""
        if len(group) <= RESTS_IN_ONE_CALL:
            return self.tokens(group) ** 2
        prompt = self.lengths[group[0]][0]
        return prompt**2 + sum(self.lengths[row][1] * self.whole(row) for row in group)

    def _width(self, rows: list[int]) -> int:
        """Of a piece whose prompts and responses are padded apart."""
        return sum(max(self.lengths[row][part] for row in rows) for part in (0, 1))

    def _fits(self, rows: int, tokens: int) -> bool:
        few = self.size is None or rows <= self.size
        return few and (self.max_tokens is None or tokens <= self.max_tokens)

    def halve_largest(self, pieces: list[list[list[int]]]) -> None:
        """Replace the piece of most tokens that has several responses by its halves, of whole groups if it can be.

        Args:
            pieces: as `pieces` makes them; changed.

        Raises:
            ValueError: no piece has several responses.
        """
        several = [sum(map(len, piece)) > 1 for piece in pieces]
        if not any(several):
            raise ValueError("there are fewer rows than pieces to make; every process needs as many rows as the others")
        tokens = [many * len(piece) * self.tokens(piece[0]) for piece, many in zip(pieces, several, strict=True)]
        largest = tokens.index(max(tokens))
        piece = pieces[largest]
        parts: list[Any] = piece if len(piece) > 1 else piece[0]
        half = (len(parts) + 1) // 2
        halves = [parts[:half], parts[half:]]
        pieces[largest : largest + 1] = halves if len(piece) > 1 else [[part] for part in halves]
