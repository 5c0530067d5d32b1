"""Several short examples in one row of a batch, so that almost nothing of it is padding.

Rows are filled by best-fit decreasing: the longest examples first, each into the row where it leaves the least room, or
into a new one (Johnson et al. 1974, "Worst-case performance bounds for simple one-dimensional packing algorithms").
Which examples share a row is decided once; each epoch shuffles the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np

from rlhf_lightning.errors import UserError


def pack(lengths: np.ndarray, capacity: int) -> list[np.ndarray]:
    """Share examples out among as few rows as best-fit decreasing finds.

    Args:
        lengths: tokens of each example, `[N]`, at least 1.
        capacity: tokens that a row holds.

    Returns:
        Numbers of the examples of each row, longest first; every example stands in exactly one row.

    Raises:
        UserError: an example is longer than a row.

    Example:
        >>> [row.tolist() for row in pack(np.array([2, 6, 4, 7]), capacity=10)]
        [[3, 0], [1, 2]]
    """
    order = np.argsort(-lengths, kind="stable")
    if len(order) and lengths[order[0]] > capacity:
        raise UserError(f"an example of {lengths[order[0]]} tokens does not fit into packed rows of {capacity} tokens")
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # rows by the tokens that still fit
    rooms = 0  # bit r is set where `with_room[r]` is not empty: the least sufficient room is one shift away
    for example, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        if fitting := rooms >> length:
            room = length + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
            rows[row].append(example)
        else:
            room, row = capacity, len(rows)
            rows.append([example])
        with_room[room - length].append(row)
        rooms |= 1 << (room - length)
    return [np.array(row) for row in rows]


class PackedTable(Sequence[list[Any]]):
    """A table of examples seen as packed rows; item i is the list of the examples of row i.

    Args:
        table: N examples.
        lengths: tokens of each, `[N]`.
        capacity: tokens that a row holds.
        groups: number of the group each example belongs to, `[N]`, int; examples of different groups share no row, so
            that a sampler can weigh the groups.

    Attributes:
        groups: group of each row, int64; None where the examples have none.
        filled: share of all rows' room that holds tokens, 0 to 1.

    Raises:
        UserError: an example is longer than a row.
    """

    def __init__(
        self, table: Sequence[Any], lengths: np.ndarray, capacity: int, groups: np.ndarray | None = None
    ) -> None:
        self._table = table
        of_row = np.zeros(len(lengths), dtype=np.int64) if groups is None else groups
        members = {group: np.flatnonzero(of_row == group) for group in np.unique(of_row).tolist()}
        packed = {group: [own[row] for row in pack(lengths[own], capacity)] for group, own in members.items()}
        rows = list(chain.from_iterable(packed.values()))
        self._examples = np.concatenate([np.zeros(0, dtype=np.int64), *rows])
        self._starts = np.cumsum([0, *map(len, rows)])
        self.groups = None if groups is None else np.repeat(list(packed), list(map(len, packed.values())))
        self.filled = float(lengths.sum() / (len(rows) * capacity)) if rows else 1.0

    def __len__(self) -> int:
        """Number of packed rows."""
        return len(self._starts) - 1

    def __getitem__(self, index: Any) -> Any:
        """The examples of one row, longest first."""
        row = range(len(self))[index]
        return [self._table[i] for i in self._examples[self._starts[row] : self._starts[row + 1]].tolist()]
