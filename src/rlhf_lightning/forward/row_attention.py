"""Attention of many sequences in one row on a CPU, where a further call is cheap: one after the other.

Notation: N tokens of all rows, L tokens of a row, H heads of d numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_lightning.compat import UNUSUAL_ARGUMENTS, sdpa_attention_forward

RESTS_IN_ONE_CALL = 2
"""With more, most of what a mask of the whole row covers is not seen, and each rest has a call of its own."""


class Call(NamedTuple):
    """Tokens that stand together and go through attention in one call.

    Attributes:
        beginning: places of what they go on from, which are the own ones of an earlier call; None for nothing.
        own: their places, right behind those of the call before.
        sees: which keys each of them attends to, `[1, 1, own, beginning + own]`, bool; None for those up to itself.
    """

    beginning: slice | None
    own: slice
    sees: Tensor | None


def calls_of(rows: Sequence[Sequence[int]]) -> list[Call]:
    """The calls for rows that stand one after the other.

    Args:
        rows: of each row the tokens of its beginning, then those of each rest that goes on from it; one number where
            nothing is shared.

    Example:
        >>> calls = calls_of([[3], [4, 1, 2, 2]])  # four tokens, which one goes on from by one and two by two
        >>> [(call.own.start, call.own.stop) for call in calls]
        [(0, 3), (3, 7), (7, 8), (8, 10), (10, 12)]
    """
    calls, start = [], 0
    for first, *rests in rows:
        whole = slice(start, start + first + sum(rests))
        beginning = slice(start, start + first) if first else None
        several = sum(map(bool, rests))
        if several == 0:
            calls.append(Call(None, whole, None))
        elif several <= RESTS_IN_ONE_CALL:
            calls.append(Call(None, whole, _seen_in_row(first, rests)))
        else:
            calls += [] if beginning is None else [Call(None, beginning, None)]
            start += first
            for length in filter(None, rests):
                calls.append(Call(beginning, slice(start, start + length), _seen_by_rest(first, length)))
                start += length
        start = whole.stop
    return calls


def _seen_by_rest(first: int, length: int) -> Tensor:
    """Which keys each token of a rest attends to: the beginning, and its own up to itself, `[1, 1, rest, keys]`."""
    return torch.ones(1, 1, length, first + length, dtype=torch.bool).tril(first)


def _seen_in_row(first: int, rests: Sequence[int]) -> Tensor:
    """Which tokens of a row each of them attends to: those of the beginning and of its own rest, `[1, 1, L, L]`."""
    owner = torch.tensor([-1, *range(len(rests))]).repeat_interleave(torch.tensor([first, *rests]))  # [L]
    return ((owner == -1) | (owner == owner.unsqueeze(1))).tril()[None, None]


def attend_in_turn(
    calls: Sequence[Call],
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
    # Not slices: the gradient of each would be as long as the row.
    lengths = [own.stop - own.start for _, own, _ in calls]
    parts = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    done, begun = [], {}
    for (beginning, own, sees), (q, k, v) in zip(calls, parts, strict=True):  # [1, heads, length, d] each
        begun[own.start] = k, v
        if beginning is not None:
            first_k, first_v = begun[beginning.start]
            k, v = torch.cat([first_k, k], dim=2), torch.cat([first_v, v], dim=2)
        done.append(sdpa_attention_forward(module, q, k, v, sees, **kwargs)[0])  # [1, length, H, d]
    return torch.cat(done, dim=1), None
